"""The figure of a shadow check: error over what the tolerance allows, for errors that are known."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from alignedkv_compile.ops import aligned_read_attention
from alignedkv_compile.options import UNIT_ROUNDOFF
from alignedkv_compile.precision import KAPPA
from alignedkv_compile.shadow import read_error

HEADS, KV_HEADS, ROWS, DIM = 8, 2, 300, 64
LENGTH = 280


def read(dtype: torch.dtype, *, queries: int = 1) -> dict[str, Any]:
    """Operands of a read and its exact result, in float64."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    query = random(2, HEADS, queries, DIM)
    key, value = random(2, KV_HEADS, ROWS, DIM), random(2, KV_HEADS, ROWS, DIM)
    return {"query": query, "key": key, "value": value, "mask": None, "sinks": None, "length": LENGTH, "scale": DIM**-0.5}


def exact(operands: dict[str, Any]) -> torch.Tensor:
    group = HEADS // KV_HEADS
    key, value = (operands[name][:, :, :LENGTH].double().repeat_interleave(group, 1) for name in ("key", "value"))
    weights = (operands["query"].double() @ key.mT * operands["scale"]).softmax(-1)
    return weights @ value


def error(operands: dict[str, Any], result: torch.Tensor, **choices: Any) -> float:
    roundoff = UNIT_ROUNDOFF[operands["key"].dtype]
    given = {"softcap": 0.0, "tolerance": 2.0, "unit_roundoff": roundoff, "certified": False, **choices}
    return read_error(**operands, result=result, **given)


@pytest.mark.parametrize("dtype", UNIT_ROUNDOFF, ids=str)
def test_rounding_alone_is_no_error(dtype: torch.dtype) -> None:
    operands = read(dtype)
    assert error(operands, exact(operands).to(dtype)) < 0.02


@pytest.mark.parametrize(
    ("dtype", "accuracy"),
    [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16), (torch.float32, torch.float16)],
    ids=str,
)
@pytest.mark.parametrize(("ratio", "tolerance"), [(0.5, 2.0), (1.0, 2.0), (3.0, 2.0), (1.0, 0.0), (1.0, 8.0)])
def test_a_known_error_is_found(dtype: torch.dtype, accuracy: torch.dtype, ratio: float, tolerance: float) -> None:
    operands, roundoff = read(dtype, queries=4), UNIT_ROUNDOFF[accuracy]
    off = with_error(exact(operands), ratio * (tolerance or 1.0) * float(KAPPA) * roundoff).to(dtype)
    assert error(operands, off, tolerance=tolerance, unit_roundoff=roundoff) == pytest.approx(ratio, rel=0.08)


def with_error(truth: torch.Tensor, relative: float) -> torch.Tensor:
    """Noise of a norm relative to that of each row."""
    noise = torch.randn(truth.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return truth + noise * (relative * truth.norm(dim=-1, keepdim=True) * DIM**-0.5)


def test_large_errors_of_float32_are_found_beside_those_of_sums() -> None:
    operands = read(torch.float32)
    off = with_error(exact(operands), 100 * 2.0 * float(KAPPA) * 2.0**-24).float()
    assert 10 < error(operands, off) < 100


def test_a_certified_read_is_judged_by_its_worst_row() -> None:
    operands = read(torch.bfloat16)
    truth = exact(operands)
    off = truth.clone()
    off[1, 3, 0] *= 1 + 16 * 2.0**-8  # one row, in the direction of the row itself: 16 u |o|
    assert error(operands, off.float(), certified=True) == pytest.approx(8.0, rel=0.02)
    expected = error(operands, off.float()) * float(KAPPA)
    assert expected == pytest.approx(8.0 / math.sqrt(2 * HEADS), rel=0.02), "an rms over all rows"


def test_sums_in_another_order_are_no_error() -> None:
    """They are off by several roundings of float32, as those of any kernel."""
    operands = read(torch.float32)
    operands["query"] = operands["query"] * 8
    keys, values = (operands[name][:, :, :LENGTH].repeat_interleave(HEADS // KV_HEADS, 1) for name in ("key", "value"))
    other = torch.nn.functional.scaled_dot_product_attention(
        operands["query"], keys.flip(2), values.flip(2), scale=operands["scale"]
    )
    assert not torch.equal(other, exact(operands).float())
    assert error(operands, other) < 1


@pytest.mark.parametrize("queries", [1, 3])
def test_masks_sinks_and_caps_are_the_reads(queries: int) -> None:
    operands = read(torch.float32, queries=queries)
    generator = torch.Generator().manual_seed(2)
    masks = [torch.rand(2, 1, queries, ROWS, generator=generator) > 0.5, torch.randn(1, HEADS, 1, LENGTH, generator=generator)]
    for mask in masks:
        operands.update(mask=mask, sinks=torch.randn(HEADS, generator=generator))
        result = aligned_read_attention.default(
            operands["query"], operands["key"], operands["value"], None, mask, operands["sinks"], length=LENGTH,
            scale=operands["scale"], softcap=5.0, tolerance=0.0, unit_roundoff=2.0**-24, min_context=0,
        )  # fmt: skip
        assert error(operands, result, softcap=5.0, unit_roundoff=2.0**-11) < 0.01
        assert error(operands, result, softcap=0.0, unit_roundoff=2.0**-11) > 1


def test_rows_without_a_size_are_left_out() -> None:
    operands = read(torch.float32)
    operands["mask"] = torch.ones(2, 1, 1, ROWS, dtype=torch.bool)
    operands["mask"][1] = False  # attends to nothing: zeros
    operands["value"][0, 1] = math.nan
    result = exact(operands).float()
    result[1] = 0
    assert error(operands, result) < 0.5
    operands["mask"][0] = False
    assert error(operands, torch.zeros_like(result)) == 0


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_result_that_is_not_finite_is_infinitely_wrong(wrong: float) -> None:
    operands = read(torch.bfloat16)
    result = exact(operands).bfloat16()
    result[0, 0, 0, 5] = wrong
    assert error(operands, result) == math.inf
    assert error(operands, result, certified=True) == math.inf
