"""The aligned read: the reference against float64, and every instruction set's kernel against the reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import (
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
    run_reference,
    without_planes,
    write_planes,
)
from hypothesis import given
from hypothesis import strategies as st

from alignedkv_compile import ops
from alignedkv_compile.layout import BLOCK_ROWS


def check_counts(kernel: dict[str, int], expected: dict[str, int]) -> None:
    for name in ("calls", "rows", "bytes_full"):
        assert kernel[name] == expected[name], name
    for name in ops.COUNTER_FIELDS:
        assert abs(kernel[name] - expected[name]) <= 0.01 * expected[name] + 8 * (64 if name == "bytes_read" else 1), name


SHAPES = [
    {"group": 3, "key_dim": 64},
    {"group": 1, "heads": 1, "key_dim": 128, "rows": 1500, "dtype": torch.float16},
    {"group": 3, "key_dim": 64, "rows": 1500, "dtype": torch.float16, "peak": 4.0},
    {"group": 4, "key_dim": 80, "value_dim": 48, "query_rows": 4, "batch": 2, "peak": 6.0},
    {"batch": 8, "heads": 1, "group": 2, "key_dim": 32, "peak": 4.0},
    {"group": 5, "key_dim": 21, "value_dim": 9, "dtype": torch.float32, "unit_roundoff": 2.0**-8, "peak": 4.0},
    {"group": 2, "key_dim": 96, "query_rows": 16, "query_dtype": torch.bfloat16, "rows": 640, "peak": 8.0, "tolerance": 4.0},
    {"group": 5, "key_dim": 21, "value_dim": 9, "rows": 1500, "dtype": torch.float32, "unit_roundoff": 2.0**-11, "peak": 4.0},
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(f"{k}={v}" for k, v in shape.items()))
def test_reference_keeps_the_tolerance(shape: dict[str, object]) -> None:
    """Added rms error at most alpha times the output's rounding error, in fewer bytes; and not by reading everything."""
    case = make_case(**shape)  # type: ignore[arg-type]
    case = replace(case, query=case.query.float())
    result = run_reference(case, write_planes(case))
    added = added_error_in_rho(case, result.output)
    assert added.square().mean().sqrt() <= case.tolerance
    assert added.max() > 0.01, "bits were skipped, so the result cannot be exact"
    assert result.counts["bytes_read"] < 0.9 * result.counts["bytes_full"]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(f"{k}={v}" for k, v in shape.items()))
def test_kernel_agrees_with_the_reference(isa: str, shape: dict[str, object]) -> None:
    case = make_case(**shape)  # type: ignore[arg-type]
    planes = write_planes(case)
    kernel, expected = run_kernel(case, planes), run_reference(case, planes)
    assert relative_errors(kernel.output, expected.output.double()).max() <= agreement_budget(case)
    check_counts(kernel.counts, expected.counts)
    assert kernel.counts["key_rows_mid"] > kernel.counts["key_rows_full"] > 0
    if case.roundoff < 2.0**-8:
        assert_second_term(kernel, lambda: run_reference(case, planes))
    assert kernel.output.is_contiguous()
    assert kernel.output.dtype == case.query.dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_tolerance_zero_is_plain_attention(isa: str, dtype: torch.dtype) -> None:
    case = without_planes(make_case(rows=1000, group=3, dtype=dtype))
    for result in (run_kernel(case, None), run_kernel(case, write_planes(case)), run_reference(case, None)):
        assert relative_errors(result.output, exact(case)).max() <= 8 * SUM_ERROR
        assert result.counts["bytes_read"] == result.counts["bytes_full"] == 2 * 1000 * 128 * dtype.itemsize


@pytest.mark.parametrize("reason", ["stale", "min_context", "expensive"])
def test_when_all_bits_are_read(reason: str) -> None:
    """Planes that say nothing, a short context, and a read that would save nothing: the cache itself is streamed."""
    case = make_case(rows=700, min_context=701 if reason == "min_context" else 0)
    if reason == "expensive":
        case = replace(case, unit_roundoff=2.0**-20)
    planes = write_planes(case, valid=reason != "stale")
    kernel, expected = run_kernel(case, planes), run_reference(case, planes)
    for result in (kernel, expected):
        assert relative_errors(result.output, exact(case)).max() <= 8 * SUM_ERROR
        assert result.counts["bytes_read"] >= result.counts["bytes_full"]
    check_counts(kernel.counts, expected.counts)


def masks(rows: int) -> dict[str, torch.Tensor]:
    """Masks of every kind for 4 query rows, 2 x 3 heads and a batch of 2."""
    generator = torch.Generator().manual_seed(3)
    causal = torch.arange(rows) <= torch.arange(rows - 4, rows)[:, None]
    padded = causal & (torch.arange(rows) >= torch.tensor([0, 200])[:, None, None])
    random = torch.rand(2, 1, 4, rows, generator=generator) < 0.7
    additive = torch.zeros(1, 1, 4, rows).masked_fill(~causal, torch.finfo(torch.float32).min)
    return {
        "causal": causal[None, None],
        "left padding": padded[:, None],
        "random": random,
        "one row": causal[None, None, 3:],
        "half empty": (torch.arange(rows) < rows // 2)[None, None, None],
        "finfo.min": additive,
        "inf": additive.masked_fill(additive < 0, -torch.inf),
        "bfloat16 finfo.min": torch.zeros(1, 1, 4, rows).masked_fill(~causal, torch.finfo(torch.bfloat16).min).bfloat16(),
        "position bias per head": torch.randn(1, 6, 4, rows, generator=generator).masked_fill(~causal, -torch.inf),
        "some rows prohibited": torch.where(torch.arange(4)[:, None] == 1, torch.finfo(torch.float32).min, additive),
        "nothing allowed (bool)": causal[None, None] & (torch.arange(4)[:, None] != 2),
    }


@pytest.mark.parametrize("name", list(masks(8)))
@pytest.mark.parametrize("tolerance", [0.0, 2.0])
def test_masks(name: str, tolerance: float) -> None:
    rows = 600
    case = make_case(batch=2, query_rows=4, rows=rows, mask=masks(rows)[name], tolerance=tolerance)
    planes = write_planes(case)
    kernel, expected = run_kernel(case, planes), run_reference(case, planes)
    stock = torch.nn.functional.scaled_dot_product_attention(
        case.query, case.key.float(), case.value.float(), _float32(case.mask), enable_gqa=True
    )
    budget = 4 * tolerance * 0.4247 * case.roundoff + 16 * SUM_ERROR
    for result in (kernel, expected):
        torch.testing.assert_close(result.output, stock, rtol=0, atol=budget * float(stock.abs().max()))
    check_counts(kernel.counts, expected.counts)
    if name == "half empty":
        assert kernel.counts["rows"] == 2 * 2 * 300, "rows that no query row attends to are not read"


def _float32(mask: torch.Tensor | None) -> torch.Tensor | None:
    return mask if mask is None or mask.dtype == torch.bool else mask.float()


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("tolerance", [0.0, 2.0])
def test_a_masked_row_changes_nothing(poison: float, tolerance: float) -> None:
    """Bit for bit: whatever masked rows hold, in K, V, their planes and their blocks."""
    rows = 900
    mask = torch.ones(1, 1, 4, rows, dtype=torch.bool)
    mask[..., :70] = False
    mask[..., 300:310] = False
    mask[..., 0, 500:] = False  # seen by the other query rows, with clean numbers
    mask[..., 850:] = False
    clean = make_case(query_rows=4, rows=rows, mask=mask, tolerance=tolerance)
    dead = ~mask.any(-2)[0, 0]
    dirty = replace(clean, key=clean.key.clone(), value=clean.value.clone())
    dirty.key[:, :, dead] = poison
    dirty.value[:, :, dead] = poison
    for run in (run_kernel, run_reference):
        results = [run(case, write_planes(case)).output for case in (clean, dirty)]
        assert torch.equal(*results)


@pytest.mark.parametrize("tolerance", [0.0, 2.0])
@pytest.mark.parametrize("where", NUMBERS)
def test_nan_and_inf_propagate_as_in_plain_attention(where: str, tolerance: float) -> None:
    case, expected = case_with_number(where, 700, tolerance)
    planes = write_planes(case)
    for result in (run_kernel(case, planes), run_reference(case, planes)):
        assert_propagated(case, result.output, expected)


@pytest.mark.parametrize("threads", [1, 2, 3, 5, 8])
def test_threads_share_the_context_of_few_heads(threads: int) -> None:
    """Fewer heads than threads, more, and a remainder; the number may change between calls of one compiled kernel."""
    before = torch.get_num_threads()
    cases = [make_case(heads=heads, rows=1100, seed=heads) for heads in (1, 3, 7)]
    expected = [run_reference(case, write_planes(case)) for case in cases]
    try:
        for case, reference in zip(cases, expected, strict=True):
            for count in (threads, before):
                torch.set_num_threads(count)
                kernel = run_kernel(case, write_planes(case))
                assert relative_errors(kernel.output, reference.output.double()).max() <= agreement_budget(case)
                check_counts(kernel.counts, reference.counts)
    finally:
        torch.set_num_threads(before)


def test_a_team_puts_scores_of_rows_with_inf_at_their_places() -> None:
    """Blocks go round the threads of a team: what is deferred returns to its own rows, and takes no other's weight."""
    before = torch.get_num_threads()
    case = make_case(batch=1, heads=1, rows=900, peak=0.1)
    case.query[..., 5] = -1.0
    case.key[:, :, 290:310, 5] = torch.inf
    case.key[:, :, 500:520, 5] = torch.inf
    planes = write_planes(case)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            kernel = run_kernel(case, planes)
            assert relative_errors(kernel.output, exact(case)).max() <= 6 * case.tolerance * 0.4247 * case.roundoff
    finally:
        torch.set_num_threads(before)


def test_length_bounds_what_is_read() -> None:
    """One graph for all live lengths of a larger buffer; rows past the length may hold anything."""
    case = make_case(rows=1000)
    case.key[:, :, 700:] = torch.nan
    case.value[:, :, 700:] = torch.nan
    planes = write_planes(case)
    for length in (1, 2, 15, 16, 17, BLOCK_ROWS, 333, 700):
        short = replace(case, length=length)
        kernel = run_kernel(short, planes)
        assert kernel.counts["rows"] == 2 * length
        assert relative_errors(kernel.output, exact(short)).max() <= 6 * case.tolerance * 0.4247 * case.roundoff


def test_strided_operands() -> None:
    """Transposed query, caches that are slices of wider tensors, an expanded mask."""
    case = make_case(batch=2, rows=500, query_rows=3)
    wide = torch.zeros(2, 3, 520, 80, dtype=case.key.dtype)
    key = wide[:, 1:, 10:510, :64]
    key.copy_(case.key)
    value = case.value.transpose(1, 2).contiguous().transpose(1, 2)
    query = case.query.transpose(1, 3).contiguous().transpose(1, 3)
    mask = torch.ones(1, 1, 1, 500, dtype=torch.bool).expand(2, 1, 3, 500)
    strided = replace(case, key=key, value=value, query=query, mask=mask)
    expected = run_reference(case, write_planes(case))
    assert torch.equal(run_reference(strided, write_planes(strided)).output, expected.output)
    kernel = run_kernel(strided, write_planes(case))
    assert relative_errors(kernel.output, expected.output.double()).max() <= agreement_budget(case)


@given(
    rows=st.integers(1, 900),
    peak=st.sampled_from([0.0, 0.5, 2.0, 6.0]),
    tolerance=st.sampled_from([1.0, 4.0]),
    seed=st.integers(0, 2**31),
    mask_rate=st.sampled_from([None, 0.02, 0.5, 0.98]),
    special=st.sampled_from(["none", "repeated rows", "sink", "outlier channel", "zeros", "tiny", "huge"]),
)
def test_any_values(rows: int, peak: float, tolerance: float, seed: int, mask_rate: float | None, special: str) -> None:
    """Kernel and reference agree, and both stay within a few budgets of float64 in every single output row."""
    mask = None
    if mask_rate is not None:
        mask = torch.rand(1, 1, 1, rows, generator=torch.Generator().manual_seed(seed)) < mask_rate
        mask[..., rows // 2] = True
    case = make_case(rows=rows, peak=peak, seed=seed, mask=mask, tolerance=tolerance)
    key, value = case.key, case.value
    if special == "repeated rows":
        key[:] = key[:, :, :1]
        value[:] = value[:, :, :1]
    elif special == "sink":
        key[:, :, 0] *= 4
        value[:, :, 0] /= 64
    elif special == "outlier channel":
        key[..., 3] += 20
    elif special == "zeros":
        value[:] = 0
    elif special == "tiny":
        value *= 2.0**-60
    elif special == "huge":
        value *= 2.0**60
    planes = write_planes(case)
    kernel, expected = run_kernel(case, planes), run_reference(case, planes)
    if special == "zeros":
        assert not kernel.output.any()
        assert not expected.output.any()
        return
    assert relative_errors(kernel.output, expected.output.double()).max() <= 4 * agreement_budget(case)
    assert added_error_in_rho(case, kernel.output).max() <= 6 * tolerance + 1
