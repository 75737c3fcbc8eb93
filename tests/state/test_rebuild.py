"""Rebuilding planes through Inductor gives what the operator gives, for every size and stride, with few compilations."""

from __future__ import annotations

import pytest
import torch

from alignedkv_compile.layout import PLANES_VALID, arena_layout
from alignedkv_compile.plane_builder import PlaneBuilder


@pytest.fixture(scope="module")
def builder() -> PlaneBuilder:
    return PlaneBuilder()


def expected(key: torch.Tensor, value: torch.Tensor, rows: int) -> torch.Tensor:
    planes = torch.zeros(arena_layout(key, value).total, dtype=torch.uint8)
    if rows:
        new = key[:, :, :rows], value[:, :, :rows]
        torch.ops.alignedkv.quantize_on_write(planes, *new, torch.arange(rows), key.shape[2])
    planes[:8].view(torch.int64).fill_(PLANES_VALID)
    return planes


def check(builder: PlaneBuilder, key: torch.Tensor, value: torch.Tensor, rows: int) -> None:
    planes = torch.full((arena_layout(key, value).total,), 0xAB, dtype=torch.uint8)  # an arena that was in use
    builder.rebuild(planes, key, value, rows)
    wanted = expected(key, value, rows)
    same = (planes == wanted).float().mean().item()
    # scales are float32 sums and maxima, whose last bit may differ between the compiled and the eager order
    assert same > 0.99, f"{1 - same:.2%} of the arena's bytes differ"
    assert torch.equal(planes[:64], wanted[:64])


def test_sizes_share_compiled_code(builder: PlaneBuilder) -> None:
    torch.manual_seed(0)
    for capacity, rows in ((64, 64), (192, 192), (100, 100), (128, 5), (320, 300), (320, 1), (64, 0), (64, 63)):
        check(builder, torch.randn(1, 2, capacity, 16), torch.randn(1, 2, capacity, 16), rows)
    assert len(builder._kernels) <= 3


def test_inference_tensors(builder: PlaneBuilder) -> None:
    with torch.inference_mode():
        key, value = torch.randn(1, 2, 128, 16), torch.randn(1, 2, 128, 16)
    check(builder, key, value, 100)


def test_strides_that_are_not_contiguous(builder: PlaneBuilder) -> None:
    key = torch.randn(1, 70, 2, 16).transpose(1, 2)
    check(builder, key, torch.randn(1, 2, 70, 16), 70)
    check(builder, key.contiguous(), torch.randn(1, 2, 70, 16), 70)


def test_different_head_dims_and_dtype(builder: PlaneBuilder) -> None:
    check(builder, torch.randn(2, 1, 96, 32).bfloat16(), torch.randn(2, 1, 96, 16).bfloat16(), 90)


def test_a_rebuild_inside_dynamo_reset_and_stances(builder: PlaneBuilder) -> None:
    torch._dynamo.reset()
    with torch.compiler.set_stance("fail_on_recompile"):
        check(builder, torch.randn(1, 2, 128, 16), torch.randn(1, 2, 128, 16), 128)
