"""The aligned read as Triton, in the interpreter, against the reference and float64."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from cases import (
    KAPPA,
    NUMBERS,
    SUM_ERROR,
    added_error_in_rho,
    agreement_budget,
    assert_propagated,
    assert_second_term,
    case_with_number,
    exact,
    make_case,
    relative_errors,
    run_kernel,
    run_scanned,
    without_planes,
    write_planes,
)
from hypothesis import given, target
from hypothesis import strategies as st
from strategies import Recipe
from triton_cases import distort, programs, random_mask, row_ordered_planes, run_triton

from alignedkv_compile import ops
from alignedkv_compile.layout import BLOCK_ROWS


def check_counts(counts: dict[str, int], expected: dict[str, int]) -> None:
    """As the reference counts, but for rows on a threshold."""
    for name in ("calls", "rows", "bytes_full"):
        assert counts[name] == expected[name], name
    for name in ops.COUNTER_FIELDS:
        slack = 0.01 * expected[name] + 8 * (64 if name == "bytes_read" else 1)
        assert abs(counts[name] - expected[name]) <= slack, name


SHAPES = [
    {"group": 3, "key_dim": 64},
    {"group": 1, "heads": 1, "key_dim": 128, "rows": 1500, "dtype": torch.float16},
    {"group": 3, "heads": 1, "key_dim": 21, "value_dim": 9, "rows": 900, "dtype": torch.float16, "peak": 4.0, "tolerance": 4.0},
    {"group": 4, "heads": 1, "key_dim": 80, "value_dim": 48, "query_rows": 4, "batch": 2, "peak": 6.0},
    {"group": 5, "heads": 1, "key_dim": 21, "value_dim": 9, "dtype": torch.float32, "unit_roundoff": 2.0**-8, "peak": 4.0},
    {"group": 2, "key_dim": 96, "query_rows": 16, "query_dtype": torch.bfloat16, "rows": 640, "peak": 8.0, "tolerance": 4.0},
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(f"{k}={v}" for k, v in shape.items()))
def test_agrees_with_the_reference(shape: dict[str, object]) -> None:
    case = make_case(**shape)  # type: ignore[arg-type]
    planes = write_planes(case)
    result, expected = run_triton(case, row_ordered_planes(case)), run_scanned(case, planes, programs(case))[0]
    assert relative_errors(result.output, expected.output.double()).max() <= agreement_budget(case)
    check_counts(result.counts, expected.counts)
    if case.roundoff < 2.0**-8:
        assert_second_term(result, lambda: run_scanned(case, planes, programs(case))[0])
    assert result.counts["key_rows_mid"] > result.counts["key_rows_full"] > 0
    assert result.output.dtype == case.query.dtype
    if case.query.dtype == torch.float32:
        assert added_error_in_rho(case, result.output).max() > 0.01, "bits were skipped, so the result cannot be exact"


def test_a_scan_starts_again_where_its_reference_was_far_off() -> None:
    """Scores 40 powers of two above all of the programs' first blocks; an int16 holds 32."""
    case = make_case(heads=1, group=1, rows=2500, peak=1.0)
    distance = 40 * math.log(2) / case.factor / float(case.query.square().sum())
    case.key[:, :, BLOCK_ROWS * programs(case) :] += (distance * case.query).to(case.key.dtype)
    planes = write_planes(case)
    result, expected = run_triton(case, row_ordered_planes(case)), run_scanned(case, planes, programs(case))[0]
    assert relative_errors(result.output, expected.output.double()).max() <= agreement_budget(case)
    assert added_error_in_rho(case, result.output).max() <= 4 * case.tolerance
    check_counts(result.counts, expected.counts)
    assert result.counts["key_rows_full"] < 2500, "not streamed"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_tolerance_zero_is_plain_attention(dtype: torch.dtype) -> None:
    case = without_planes(make_case(rows=400, group=3, dtype=dtype))
    result = run_triton(case, row_ordered_planes(case))
    assert relative_errors(result.output, exact(case)).max() <= 8 * SUM_ERROR
    assert result.counts["bytes_read"] == result.counts["bytes_full"] == 2 * 400 * 128 * dtype.itemsize


@pytest.mark.parametrize(
    "shape",
    [{"key_dim": 512, "value_dim": 256, "group": 1}, {"group": 3, "query_rows": 16}],
    ids=["wide head", "many query rows"],
)
def test_what_the_planes_are_not_read_for_is_streamed(shape: dict[str, int]) -> None:
    case = make_case(heads=1, rows=300, **shape)  # type: ignore[arg-type]
    result = run_triton(case, row_ordered_planes(case))
    assert relative_errors(result.output, exact(case)).max() <= 8 * SUM_ERROR
    assert result.counts["bytes_read"] == result.counts["bytes_full"]


@pytest.mark.parametrize("reason", ["stale", "min_context", "expensive", "extreme norms"])
def test_when_all_bits_are_read(reason: str) -> None:
    case = make_case(rows=300, min_context=301 if reason == "min_context" else 0)
    if reason == "expensive":
        case = replace(case, unit_roundoff=2.0**-20)
    if reason == "extreme norms":
        case = replace(case, value=case.value * 2.0**60)
    result = run_triton(case, row_ordered_planes(case, valid=reason != "stale"))
    expected = run_scanned(case, write_planes(case, valid=reason != "stale"), programs(case))[0]
    assert relative_errors(result.output, exact(case)).max() <= 8 * SUM_ERROR
    for name, count in expected.counts.items():
        assert name == "bytes_read" or result.counts[name] == count, name
    assert result.counts["bytes_read"] >= result.counts["bytes_full"]


def test_a_dominant_row_misread_at_4_bits_has_the_cache_streamed() -> None:
    """The other rows were chosen by weights 80 times too small. That all bits cost less was not predicted."""
    shape = {"heads": 1, "group": 2, "rows": 700, "key_dim": 64, "value_dim": 64, "dtype": torch.float16, "peak": 3.0}
    case = Recipe(**shape, values="dominant token", tolerance=1.0, seed=1).case()
    result, expected = run_triton(case, row_ordered_planes(case)), run_scanned(case, write_planes(case), programs(case))[0]
    assert relative_errors(result.output, expected.output.double()).max() <= 8 * SUM_ERROR
    assert 0 < expected.counts["key_rows_mid"] < 700 <= result.counts["key_rows_full"] == expected.counts["key_rows_full"]


def masks(rows: int) -> dict[str, torch.Tensor]:
    """Masks of every kind for 4 query rows, 2 x 3 heads and a batch of 2."""
    generator = torch.Generator().manual_seed(3)
    causal = torch.arange(rows) <= torch.arange(rows - 4, rows)[:, None]
    padded = causal & (torch.arange(rows) >= torch.tensor([0, 200])[:, None, None])
    additive = torch.zeros(1, 1, 4, rows).masked_fill(~causal, torch.finfo(torch.float32).min)
    return {
        "left padding": padded[:, None],
        "random": torch.rand(2, 1, 4, rows, generator=generator) < 0.7,
        "half empty": (torch.arange(rows) < rows // 2)[None, None, None],
        "finfo.min": additive,
        "bfloat16 finfo.min": torch.zeros(1, 1, 4, rows).masked_fill(~causal, torch.finfo(torch.bfloat16).min).bfloat16(),
        "position bias per head": torch.randn(1, 6, 4, rows, generator=generator).masked_fill(~causal, -torch.inf),
        "some rows prohibited": torch.where(torch.arange(4)[:, None] == 1, torch.finfo(torch.float32).min, additive),
        "nothing allowed (bool)": causal[None, None] & (torch.arange(4)[:, None] != 2),
    }


SLOW_MASKS = ("random", "half empty", "bfloat16 finfo.min", "some rows prohibited")
"""Each looks like another one to the kernels; ``make test-all`` has them."""


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW_MASKS)) for name in masks(8)])
@pytest.mark.parametrize("tolerance", [0.0, 2.0])
def test_masks(name: str, tolerance: float) -> None:
    rows = 400
    mask = masks(rows)[name]
    case = make_case(batch=2, query_rows=4, rows=rows, mask=mask, tolerance=tolerance)
    result = run_triton(case, row_ordered_planes(case))
    expected = run_scanned(case, write_planes(case), programs(case))[0]
    stock = torch.nn.functional.scaled_dot_product_attention(
        case.query, case.key.float(), case.value.float(), mask if mask.dtype == torch.bool else mask.float(), enable_gqa=True
    )
    budget = 4 * tolerance * KAPPA * case.roundoff + 16 * SUM_ERROR
    torch.testing.assert_close(result.output, stock, rtol=0, atol=budget * float(stock.abs().max()))
    check_counts(result.counts, expected.counts)
    if name == "half empty":
        assert result.counts["rows"] == 2 * 2 * rows // 2, "rows that no query row attends to are not read"


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("tolerance", [0.0, 2.0])
def test_a_masked_row_changes_nothing(poison: float, tolerance: float) -> None:
    """Bit for bit: whatever masked rows hold, in K, V, their planes and their blocks."""
    rows = 500
    mask = torch.ones(1, 1, 2, rows, dtype=torch.bool)
    mask[..., :70] = False
    mask[..., 300:310] = False
    mask[..., 0, 400:] = False  # seen by the other query row, with clean numbers
    mask[..., 450:] = False
    clean = make_case(query_rows=2, heads=1, rows=rows, mask=mask, tolerance=tolerance)
    dead = ~mask.any(-2)[0, 0]
    dirty = replace(clean, key=clean.key.clone(), value=clean.value.clone())
    dirty.key[:, :, dead] = poison
    dirty.value[:, :, dead] = poison
    assert torch.equal(*(run_triton(case, row_ordered_planes(case)).output for case in (clean, dirty)))


@pytest.mark.parametrize("tolerance", [0.0, 2.0])
@pytest.mark.parametrize("where", NUMBERS)
def test_nan_and_inf_propagate_as_in_plain_attention(where: str, tolerance: float) -> None:
    case, expected = case_with_number(where, 400, tolerance)
    assert_propagated(case, run_triton(case, row_ordered_planes(case)).output, expected)


def test_length_bounds_what_is_read() -> None:
    """Rows past the live length of a larger buffer may hold anything."""
    case = make_case(rows=500, heads=1)
    case.key[:, :, 300:] = torch.nan
    case.value[:, :, 300:] = torch.nan
    planes = row_ordered_planes(case)
    for length in (1, 15, 16, 17, BLOCK_ROWS, 300):
        short = replace(case, length=length)
        result = run_triton(short, planes)
        assert result.counts["rows"] == length
        assert relative_errors(result.output, exact(short)).max() <= 6 * case.tolerance * KAPPA * case.roundoff


@pytest.mark.slow
def test_strided_operands_and_one_tensor_as_key_and_value() -> None:
    case = make_case(batch=2, rows=300, query_rows=3)
    wide = torch.zeros(2, 3, 320, 80, dtype=case.key.dtype)
    key = wide[:, 1:, 10:310, :64]
    key.copy_(case.key)
    query = case.query.transpose(1, 3).contiguous().transpose(1, 3)
    mask = torch.ones(1, 1, 1, 300, dtype=torch.bool).expand(2, 1, 3, 300)
    value = case.value.transpose(1, 2).contiguous().transpose(1, 2)
    strided = replace(case, key=key, value=value, query=query, mask=mask)
    expected = run_scanned(case, write_planes(case), programs(case))[0]
    result = run_triton(strided, row_ordered_planes(case))
    assert relative_errors(result.output, expected.output.double()).max() <= agreement_budget(case)
    shared = replace(case, value=case.key)
    result = run_triton(shared, row_ordered_planes(shared))
    assert relative_errors(result.output, exact(shared)).max() <= 6 * shared.tolerance * KAPPA * shared.roundoff


def test_max_autotune_changes_nothing() -> None:
    """Each kernel has one launch, so that there is nothing to measure."""
    case = without_planes(make_case(rows=200, heads=1))
    result = run_triton(case, None, max_autotune=True)
    assert relative_errors(result.output, exact(case)).max() <= 8 * SUM_ERROR


@pytest.mark.usefixtures("one_compilation")
@pytest.mark.slow
@given(
    rows=st.integers(1, 500),
    peak=st.sampled_from([0.0, 0.5, 2.0, 6.0]),
    tolerance=st.sampled_from([0.0, 1.0, 4.0]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    seed=st.integers(0, 2**31),
    mask_rate=st.sampled_from([None, 0.02, 0.5, 0.98]),
    special=st.sampled_from(["none", "repeated rows", "sink", "outlier channel", "zeros", "tiny", "huge"]),
)
def test_any_values(
    rows: int, peak: float, tolerance: float, dtype: torch.dtype, seed: int, mask_rate: float | None, special: str
) -> None:
    """Triton and reference agree, and Triton stays within a few budgets of float64 in every single output row."""
    mask = random_mask(mask_rate, rows, seed)
    roundoff = 2.0**-11 if dtype == torch.float32 else None
    case = make_case(
        heads=1, rows=rows, peak=peak, seed=seed, mask=mask, tolerance=tolerance, dtype=dtype, unit_roundoff=roundoff
    )
    distort(case, special, 12 if dtype == torch.float16 else 60)
    result, expected = run_kernel(case, row_ordered_planes(case)), run_scanned(case, write_planes(case), programs(case))[0]
    if special == "zeros":
        assert not result.output.any()
        return
    difference = float(relative_errors(result.output, expected.output.double()).max()) / (4 * agreement_budget(case))
    added = float(added_error_in_rho(case, result.output).max()) / (6 * tolerance + 1)
    target(difference, label="difference from the reference over its budget")
    target(added, label="error against float64 over its budget")
    assert difference <= 1
    assert added <= 1
