"""Capped scores and sinks as Triton, in the interpreter, against the reference and float64."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from cases import (
    KAPPA,
    SUM_ERROR,
    Case,
    added_error_in_rho,
    agreement_budget,
    exact,
    make_case,
    misread_case,
    relative_errors,
    run_scanned,
    without_planes,
    write_planes,
)
from test_triton_attention import check_counts, masks
from triton_cases import programs, row_ordered_planes, run_triton

SINKS = torch.tensor([4.0, 12.0, -3.0, 20.0, 30.0, -math.inf])
VARIANTS: dict[str, dict[str, object]] = {
    "softcap": {"softcap": 12.0},
    "sinks": {"sinks": SINKS},
    "both": {"softcap": 12.0, "sinks": SINKS.bfloat16()},
}
COMPILED = [*(pytest.param(name, marks=pytest.mark.slow) for name in ("softcap", "sinks")), "both"]
"""Each takes seconds in the interpreter; both at once is what the fast run takes."""


def variant(name: str, **fields: object) -> Case:
    return make_case(**{"group": 3, "rows": 900, "peak": 6.0, **VARIANTS[name], **fields})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", COMPILED)
def test_agrees_with_the_reference(name: str) -> None:
    case = variant(name)
    planes = write_planes(case)
    result, expected = run_triton(case, row_ordered_planes(case)), run_scanned(case, planes, programs(case))[0]
    assert relative_errors(result.output, expected.output.double()).max() <= agreement_budget(case)
    check_counts(result.counts, expected.counts)
    assert result.counts["key_rows_mid"] > result.counts["key_rows_full"] > 0
    assert result.counts["bytes_read"] < result.counts["bytes_full"]
    assert 0.01 < added_error_in_rho(case, result.output).max() <= 4 * case.tolerance


@pytest.mark.parametrize("planes", [False, True])
def test_tolerance_zero(planes: bool) -> None:
    """Beside an arena one launch, else two."""
    case = without_planes(variant("both", rows=300))
    result = run_triton(case, row_ordered_planes(case) if planes else None)
    assert relative_errors(result.output, exact(case)).max() <= 8 * SUM_ERROR


@pytest.mark.parametrize(
    "name", ["random", "finfo.min", "position bias per head", "some rows prohibited", "nothing allowed (bool)"]
)
@pytest.mark.parametrize("tolerance", [pytest.param(0.0, marks=pytest.mark.slow), 2.0])
def test_masks(name: str, tolerance: float) -> None:
    rows = 400
    case = variant("both", batch=2, query_rows=4, rows=rows, mask=masks(rows)[name], tolerance=tolerance)
    result = run_triton(case, row_ordered_planes(case))
    expected = exact(case)
    budget = 4 * tolerance * KAPPA * case.roundoff + 16 * SUM_ERROR
    torch.testing.assert_close(result.output.double(), expected, rtol=0, atol=budget * float(expected.abs().max()))
    check_counts(result.counts, run_scanned(case, write_planes(case), programs(case))[0].counts)
    nothing = expected.norm(dim=-1) == 0
    assert bool(nothing.any()) == name.startswith(("some rows", "nothing"))
    assert not result.output[nothing].any()


@pytest.mark.parametrize("sink", [45.0, 300.0])
def test_a_sink_that_takes_nearly_everything(sink: float) -> None:
    case = make_case(rows=300, peak=0.3, sinks=torch.full((6,), sink))
    result = run_triton(case, row_ordered_planes(case))
    if sink < 80:
        assert added_error_in_rho(case, result.output).max() <= 4 * case.tolerance
    else:
        assert float(result.output.abs().max()) <= 1e-38


def test_bits_are_added_to_scores_before_the_cap() -> None:
    """As in tests/kernel: behind the cap, they would have the cache streamed."""
    case = replace(misread_case(24.0, 6.0), softcap=1.0)
    result = run_triton(case, row_ordered_planes(case))
    assert result.counts["key_rows_mid"] == 1
    assert result.counts["key_rows_full"] <= 1 < result.counts["rows"]
    assert added_error_in_rho(case, result.output).max() <= case.tolerance
