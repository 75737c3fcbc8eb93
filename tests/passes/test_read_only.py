"""Attention over caches that a graph only reads: what is rewritten, and when the planes are built."""

# ruff: noqa: ANN001 - fixtures and the functions that Dynamo traces read better bare

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from alignedkv_compile.contract import CallSettings, Outcome
from alignedkv_compile.layout import PLANES_VALID, arena_layout
from alignedkv_compile.passes.caches.read_only import ReadOnlyBinding
from alignedkv_compile.state.sidecar import MAX_CONSECUTIVE_REBUILDS, NO_VERSION_COUNTER
from alignedkv_compile.state.stores import Stores

ROWS, DIM = 40, 16


def cross_attention(query, keys, values, mask):
    return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)


def inputs(rows: int = 1, heads: int = 2, dtype: torch.dtype = torch.float32):
    caches = [torch.randn(2, heads, ROWS, DIM).to(dtype) for _ in range(2)]
    return [torch.randn(2, 2, rows, DIM).to(dtype), *caches, torch.rand(2, 1, rows, ROWS) < 0.7]


@pytest.mark.parametrize("rows", [1, 16])
def test_reads_without_a_write(harness, same_as_stock, operations, rows: int) -> None:
    same_as_stock(cross_attention, harness, *inputs(rows))
    assert harness.outcomes == [Outcome.REWRITTEN]
    after = operations(harness.last.module)
    assert after["aligned_read_attention.default"] == 1
    assert after["quantize_on_write.default"] == after["scaled_dot_product_attention"] == 0


def test_a_long_query_is_left_alone(harness, same_as_stock, operations) -> None:
    same_as_stock(cross_attention, harness, *inputs(17))
    assert harness.outcomes == [Outcome.PREFILL]
    assert harness.last.caches == ()
    assert operations(harness.last.module) == operations(harness.originals[-1])


def test_inputs_that_are_no_caches_are_left_alone(harness, same_as_stock) -> None:
    def over_a_product(query, keys, values, mask):
        return F.scaled_dot_product_attention(query, keys * 2, values, attn_mask=mask)

    same_as_stock(over_a_product, harness, *inputs())
    assert harness.outcomes == []


class Builder:
    """Marks planes valid and counts."""

    def __init__(self) -> None:
        self.builds = 0

    def rebuild(self, planes: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: int) -> None:
        self.builds += 1
        assert rows == key.shape[2]
        planes[:8].view(torch.int64).fill_(PLANES_VALID)


class Calls:
    """One compiled graph's binding, called with pairs of tensors."""

    def __init__(self, *, trust: bool = False) -> None:
        self.builder, self.notes = Builder(), []
        self.bound = ReadOnlyBinding(0, 1, 0).bind(CallSettings(Stores(self.builder), trust, self.notes.append))

    def __call__(self, key: torch.Tensor, value: torch.Tensor) -> bool:
        """Whether the planes that the graph got were valid."""
        graph_inputs: list[object] = [None]
        held = self.bound.before_call([key, value], graph_inputs)
        self.bound.after_call(held, [key, value], [])
        (planes,) = graph_inputs
        assert isinstance(planes, torch.Tensor)
        assert planes.numel() == arena_layout(key, value).total
        return int(planes[:8].view(torch.int64)) == PLANES_VALID


def pair() -> list[torch.Tensor]:
    return [torch.randn(1, 2, ROWS, DIM) for _ in range(2)]


def test_planes_are_built_once_when_a_cache_comes_again() -> None:
    call, cache = Calls(), pair()
    assert [call(*cache) for _ in range(5)] == [False, True, True, True, True]
    assert call.builder.builds == 1
    assert call.notes == []


def test_tensors_that_never_come_again_cost_no_planes() -> None:
    call = Calls()
    assert not any(call(*pair()) for _ in range(10))
    assert call.builder.builds == 0


def test_a_cache_filled_anew_for_every_text_gets_new_planes_each_time() -> None:
    call, cache = Calls(), pair()
    for text in range(2 * MAX_CONSECUTIVE_REBUILDS):
        for tensor in cache:
            tensor.copy_(torch.randn_like(tensor))
        assert [call(*cache) for _ in range(4)] == [False, True, True, True]
        assert call.builder.builds == text + 1


def test_a_cache_written_before_every_call_is_never_trusted() -> None:
    call, (key, value) = Calls(), pair()
    for _ in range(6):
        value.add_(1)
        assert not call(key, value)
    assert call.builder.builds == 0


def test_inference_tensors_are_read_in_full_unless_trusted() -> None:
    with torch.inference_mode():
        cache = pair()
    call, trusting = Calls(), Calls(trust=True)
    assert not any(call(*cache) for _ in range(3))
    assert call.notes == [NO_VERSION_COUNTER] * 2
    assert [trusting(*cache) for _ in range(3)] == [False, True, True]
