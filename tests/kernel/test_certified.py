"""The certified read in generated C++: every instruction set against the reference, and certificates against float64."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from cases import (
    MISREAD,
    NUMBERS,
    SUM_ERROR,
    Case,
    Certified,
    case_with_number,
    certified_errors,
    exact,
    make_case,
    misread_case,
    run_certified_kernel,
    run_certified_reference,
    write_planes,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attention import masks

from alignedkv_compile import ops
from alignedkv_compile.worst_case import FLOAT_SLACK, SUM_SLACK

DEEP = 8
"""Examples per example of the profile, for each of the shapes."""
SHAPES = [
    {"group": 3, "key_dim": 64, "rows": 900, "peak": 6.0, "tolerance": 4.0},
    {"heads": 1, "group": 1, "key_dim": 128, "rows": 1500, "dtype": torch.float16, "peak": 5.0, "tolerance": 32.0},
    {"batch": 2, "group": 4, "key_dim": 80, "value_dim": 48, "query_rows": 4, "peak": 6.0, "tolerance": 16.0},
    {
        "heads": 3,
        "group": 5,
        "key_dim": 21,
        "value_dim": 9,
        "dtype": torch.float32,
        "unit_roundoff": 2.0**-8,
        "peak": 5.0,
        "tolerance": 8.0,
    },
]
GENERATED = [
    {"group": 3, "key_dim": 64, "tolerance": 8.0},
    pytest.param({"heads": 1, "group": 1, "key_dim": 128, "dtype": torch.float16, "tolerance": 64.0}, marks=pytest.mark.slow),
    {"heads": 3, "group": 2, "key_dim": 21, "value_dim": 40, "query_rows": 2, "tolerance": 256.0},
]
"""Fewer heads than threads, a head of its own, and a remainder; one kernel each."""


def float32_error(case: Case, result: Certified) -> torch.Tensor:
    """What arithmetic may add to the errors ``[Hq]``: the float32 output's rounding, and for heads that were streamed, whose
    certificate is 0, float32 attention's own error on the scores and the sum."""
    size = result.output.double().norm(dim=-1).amin((0, 2)).clamp_min(1e-300)
    score = float(case.query.norm(dim=-1).max() * case.key[:, :, : case.live].float().norm(dim=-1).max()) * case.factor
    largest = float(case.value[:, :, : case.live].float().norm(dim=-1).max())
    streamed = (8 * SUM_ERROR + 2.0**-22 * score) * largest / size
    rounding = 2.0**-23 + 2.0**-150 * result.output.shape[-1] ** 0.5 / size
    return (rounding + torch.where(result.bounds == 0, streamed, 0.0)) / case.roundoff


def check_certificates(case: Case, result: Certified) -> None:
    errors = certified_errors(case, result.output)
    assert bool((errors <= result.bounds + float32_error(case, result)).all()), (result.bounds.tolist(), errors.tolist())
    assert bool((result.bounds <= case.tolerance * (1 + 2.0**-22)).all()), result.bounds.tolist()


def check_agreement(case: Case, kernel: Certified, expected: Certified) -> None:
    """The same rows were read, but for those on a threshold, and the certificates differ by what float32 adds to them."""
    for name in ops.COUNTER_FIELDS:
        slack = 0.01 * expected.counts[name] + 8 * (64 if name == "bytes_read" else 1)
        assert abs(kernel.counts[name] - expected.counts[name]) <= slack, name
    lost = 4 * (float(SUM_SLACK) + float(FLOAT_SLACK)) / case.roundoff
    for found, other in zip(kernel.bounds.tolist(), expected.bounds.tolist(), strict=True):
        assert found == pytest.approx(other, rel=0.02, abs=lost)
    difference = (kernel.output.double() - expected.output.double()).norm(dim=-1)
    size = expected.output.double().norm(dim=-1).clamp_min(1e-30)
    assert float((difference / size).max()) <= 0.25 * case.tolerance * case.roundoff + 16 * SUM_ERROR


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(f"{k}={v}" for k, v in shape.items()))
def test_kernel_agrees_with_the_reference(isa: str, shape: dict[str, object]) -> None:
    case = make_case(**shape)  # type: ignore[arg-type]
    planes = write_planes(case)
    kernel, expected = run_certified_kernel(case, planes), run_certified_reference(case, planes)
    check_agreement(case, kernel, expected)
    check_certificates(case, kernel)
    assert 0 < kernel.counts["key_rows_mid"] < kernel.counts["rows"]
    assert kernel.counts["bytes_read"] < 0.95 * kernel.counts["bytes_full"], "without bits left out this tests nothing"
    assert bool((kernel.bounds > 0).all())


@pytest.mark.parametrize("shape", GENERATED, ids=lambda shape: "-".join(f"{k}={v}" for k, v in shape.items()))
@settings(max_examples=settings().max_examples * DEEP)
@given(
    rows=st.one_of(st.integers(2, 40), st.integers(2, 700), st.sampled_from((127, 128, 129, 256))),
    peak=st.sampled_from((0.0, 0.3, 2.0, 5.0, 12.0)),
    values=st.sampled_from(("normal", "repeated rows", "all equal", "outlier channel", "zeros", "tiny", "huge", "far codes")),
    attended=st.sampled_from((None, 0.05, 0.6)),
    seed=st.integers(0, 2**31),
)
def test_no_error_exceeds_its_certificate(
    shape: dict[str, object], rows: int, peak: float, values: str, attended: float | None, seed: int
) -> None:
    mask = None
    if attended is not None:
        generator = torch.Generator().manual_seed(seed)
        mask = torch.rand(1, 1, shape.get("query_rows", 1), rows, generator=generator) < attended  # type: ignore[arg-type]
        mask[..., rows // 2] = True
    case = make_case(**shape, rows=rows, peak=peak, seed=seed, mask=mask)  # type: ignore[arg-type]
    change_values(values, case.key, case.value)
    check_certificates(case, run_certified_kernel(case, write_planes(case)))


def change_values(kind: str, key: torch.Tensor, value: torch.Tensor) -> None:
    """Turn normal K and V into a kind that is hard for a bound, in place."""
    if kind == "repeated rows":
        key[:], value[:] = key[:, :, :1].clone(), value[:, :, :1].clone()
    elif kind == "all equal":
        key[:], value[:] = 0.7, -1.3
    elif kind == "outlier channel":
        key[..., 0] += 20
        value[..., -1] *= 30
    elif kind == "zeros":
        key[:, :, ::2] = 0
        value[:, :, 1::3] = 0
    elif kind == "tiny":
        value *= 2.0**-14
    elif kind == "huge":
        value *= 2.0**12
    elif kind == "far codes":  # V at the far edge of its intervals, all errors on one side
        position = torch.arange(value.shape[2])
        dither = (position * 0.6180339887498949) % 1 - 0.5
        value[:] = ((position % 7 - 3) / 8 + (0.999 - dither) / 8)[:, None].to(value.dtype)
        value[..., 0] = 15 / 16


@pytest.mark.parametrize("name", list(masks(8)))
def test_masks(name: str) -> None:
    rows = 600
    case = make_case(batch=2, query_rows=4, rows=rows, mask=masks(rows)[name], peak=5.0, tolerance=32.0)
    planes = write_planes(case)
    kernel, expected = run_certified_kernel(case, planes), run_certified_reference(case, planes)
    check_agreement(case, kernel, expected)
    attended = torch.isfinite(exact(case)).all() and exact(case).norm(dim=-1).amin((0, 2)) > 0
    assert bool(attended.all()) or name.startswith("nothing")
    assert torch.equal(kernel.output.norm(dim=-1) == 0, exact(case).norm(dim=-1) == 0)
    if name == "half empty":
        assert kernel.counts["rows"] == 2 * 2 * 300, "rows that no query row attends to are not read"


@pytest.mark.parametrize("above", [False, True])
@pytest.mark.parametrize(("strength", "score"), MISREAD)
def test_a_row_that_4_bits_misread_is_not_lost(strength: float, score: float, above: bool) -> None:
    """Weights underflow, overflow and bounds leave floats: the row is read further, or the head in full."""
    case = misread_case(strength, score, above=above)
    check_certificates(case, run_certified_kernel(case, write_planes(case)))


def test_a_bias_far_below_the_others_costs_nothing() -> None:
    """-1e9, which many models add where nobody shall attend, is no prohibition but a score."""
    rows = 600
    bias = torch.zeros(1, 1, 1, rows)
    bias[..., :300] = -1e9
    case = make_case(rows=rows, mask=bias, peak=6.0, tolerance=8.0)
    planes = write_planes(case)
    kernel = run_certified_kernel(case, planes)
    check_certificates(case, kernel)
    expected = run_certified_reference(case, planes)
    check_agreement(case, kernel, expected)
    assert torch.equal(kernel.bounds > 0, expected.bounds > 0)
    assert bool(kernel.bounds.any())


@pytest.mark.parametrize("threads", [1, 2, 3, 5, 8])
def test_threads_share_the_context_of_few_heads(threads: int) -> None:
    """Fewer heads than threads, more, and a remainder: teams read the same rows and certify the same."""
    before = torch.get_num_threads()
    try:
        for heads in (1, 3, 7):
            case = make_case(heads=heads, rows=1100, seed=heads, peak=6.0, tolerance=4.0)
            planes = write_planes(case)
            expected = run_certified_reference(case, planes)
            for count in (threads, before):
                torch.set_num_threads(count)
                check_agreement(case, run_certified_kernel(case, planes), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("reason", ["stale", "min_context", "expensive", "finer than floats", "tolerance 0", "no planes"])
def test_when_all_bits_are_read(reason: str) -> None:
    case = make_case(rows=700, tolerance=4.0, min_context=701 if reason == "min_context" else 0)
    if reason == "expensive":
        case = replace(case, unit_roundoff=2.0**-15)
    if reason == "finer than floats":
        case = replace(case, unit_roundoff=2.0**-19)
    if reason == "tolerance 0":
        case = replace(case, tolerance=0.0)
    planes = None if reason == "no planes" else write_planes(case, valid=reason != "stale")
    kernel, expected = run_certified_kernel(case, planes), run_certified_reference(case, planes)
    for result in (kernel, expected):
        assert not result.bounds.any()
        assert float(certified_errors(case, result.output).max()) <= 8 * SUM_ERROR / case.roundoff
        full = result.counts["bytes_full"]
        assert full <= result.counts["bytes_read"] <= (1.3 if reason == "expensive" else 1.0) * full
    check_agreement(case, kernel, expected)


@pytest.mark.parametrize("where", NUMBERS)
def test_numbers_that_are_not_finite_are_read_as_they_are(where: str) -> None:
    case, expected = case_with_number(where, 700, 32.0)
    kernel = run_certified_kernel(case, write_planes(case))
    finite = torch.isfinite(expected)
    assert torch.equal(torch.isfinite(kernel.output), finite)
    infinite = ~finite & ~expected.isnan()
    assert torch.equal(kernel.output[infinite].double(), expected[infinite])
    largest = float(expected[finite].abs().max())
    # the KV head with the number is streamed; the other one keeps to its certificate
    budget = (float(kernel.bounds.max()) * case.roundoff * math.sqrt(expected.shape[-1]) + 16 * SUM_ERROR) * largest
    torch.testing.assert_close(kernel.output[finite].double(), expected[finite], rtol=0, atol=budget)
    assert not kernel.bounds.view(2, -1)[int(where.startswith("key"))].any()


def test_length_bounds_what_is_read() -> None:
    """Rows past the length may hold anything."""
    case = make_case(rows=1000, peak=6.0, tolerance=8.0)
    case.key[:, :, 700:] = torch.nan
    case.value[:, :, 700:] = torch.nan
    planes = write_planes(case)
    for length in (1, 15, 17, 128, 333, 700):
        short = replace(case, length=length)
        kernel = run_certified_kernel(short, planes)
        assert kernel.counts["rows"] == 2 * length
        check_certificates(short, kernel)


def test_bounds_hold_the_last_certificates_and_the_largest_of_a_run() -> None:
    bounds, counters = torch.zeros(1, 2, 6), torch.zeros(1, len(ops.COUNTER_FIELDS), dtype=torch.int64)
    seen = torch.zeros(6)
    attention = torch.compile(lambda *arguments: ops.certified_read_attention.counted(*arguments), fullgraph=True)
    for seed in range(3):
        case = make_case(rows=500, peak=6.0, seed=seed, tolerance=8.0)
        planes = write_planes(case)
        alone = run_certified_kernel(case, planes).bounds
        attention(*case.arguments(planes), bounds, counters, 0)
        seen = torch.maximum(seen, alone)
        torch.testing.assert_close(bounds[0, 0], alone)
        torch.testing.assert_close(bounds[0, 1], seen)
