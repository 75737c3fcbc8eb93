"""Capped scores and sinks: the references against float64, the generated C++ against the references."""

from __future__ import annotations

import ctypes
import math
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import (
    SUM_ERROR,
    Case,
    added_error_in_rho,
    agreement_budget,
    exact,
    make_case,
    misread_case,
    relative_errors,
    run_certified_kernel,
    run_certified_reference,
    run_kernel,
    run_reference,
    run_scanned,
    without_planes,
    write_planes,
)
from test_attention import check_counts, masks
from test_certified import check_agreement, check_certificates

from alignedkv_compile import layout
from alignedkv_compile.lowering.constants import SHARED, print_cpp
from alignedkv_compile.lowering.cpp_kernel import render
from alignedkv_compile.lowering.isa import TARGETS

SINKS = torch.tensor([4.0, 12.0, -3.0, 20.0, 30.0, -math.inf])
"""For six query heads: below the largest scores, among them, above them, and none."""
VARIANTS: dict[str, dict[str, object]] = {
    "softcap": {"softcap": 12.0},
    "sinks": {"sinks": SINKS},
    "both": {"softcap": 12.0, "sinks": SINKS.bfloat16()},
}


def slowly(*values: object) -> list[object]:
    """Parameters for `make test-all` only: each costs a compilation, some for every instruction set."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


COMPILED = [*slowly("softcap", "sinks"), "both"]


def variant(name: str, **fields: object) -> Case:
    """Scores of up to 25, of which the cap leaves half."""
    return make_case(**{"group": 3, "rows": 900, "peak": 6.0, **VARIANTS[name], **fields})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", VARIANTS)
def test_the_cases_differ_from_plain_attention(name: str) -> None:
    case = variant(name)
    assert relative_errors(exact(replace(case, softcap=0.0, sinks=None)), exact(case)).max() > 0.5


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("order", ["CPU", "GPU"])
@pytest.mark.parametrize("peak", [1.0, 6.0])
def test_references_keep_the_tolerance(name: str, order: str, peak: float) -> None:
    case = variant(name, peak=peak, tolerance=4.0)
    planes = write_planes(case)
    result = run_reference(case, planes) if order == "CPU" else run_scanned(case, planes)[0]
    added = added_error_in_rho(case, result.output)
    assert added.square().mean().sqrt() <= case.tolerance
    assert added.max() > 0.01, "bits were skipped, so the result cannot be exact"
    assert result.counts["bytes_read"] < 0.9 * result.counts["bytes_full"]


@pytest.mark.parametrize("name", COMPILED)
def test_kernels_agree_with_the_reference(isa: str, name: str) -> None:
    case = variant(name)
    planes = write_planes(case)
    kernel, expected = run_kernel(case, planes), run_reference(case, planes)
    assert relative_errors(kernel.output, expected.output.double()).max() <= agreement_budget(case)
    check_counts(kernel.counts, expected.counts)
    assert kernel.counts["key_rows_mid"] > kernel.counts["key_rows_full"] > 0
    assert added_error_in_rho(case, kernel.output).square().mean().sqrt() <= case.tolerance
    case = replace(case, tolerance=0.0)
    assert relative_errors(run_kernel(case, planes).output, exact(case)).max() <= 8 * SUM_ERROR


@pytest.mark.parametrize("name", COMPILED)
def test_certified_kernels_agree_with_the_reference(isa: str, name: str) -> None:
    case = variant(name, tolerance=8.0)
    planes = write_planes(case)
    kernel, expected = run_certified_kernel(case, planes), run_certified_reference(case, planes)
    check_agreement(case, kernel, expected)
    for result in (kernel, expected):
        check_certificates(case, result)
        assert 0 < result.counts["key_rows_mid"] < result.counts["rows"]
        assert result.counts["bytes_read"] < 0.95 * result.counts["bytes_full"], "without bits left out this tests nothing"
        assert bool((result.bounds > 0).all())


@pytest.mark.parametrize(
    "name", ["random", *slowly("finfo.min", "position bias per head", "some rows prohibited"), "nothing allowed (bool)"]
)
@pytest.mark.parametrize("tolerance", [*slowly(0.0), 2.0])
def test_masks(name: str, tolerance: float) -> None:
    """The mask is added to capped scores and takes nothing off a sink; a row that attends to nothing gives zeros."""
    rows = 600
    case = variant("both", batch=2, query_rows=4, rows=rows, mask=masks(rows)[name], tolerance=tolerance)
    planes = write_planes(case)
    expected = exact(case)
    budget = 4 * tolerance * 0.4247 * case.roundoff + 16 * SUM_ERROR
    for run in (run_kernel, run_reference, lambda case, planes: run_scanned(case, planes)[0]):
        result = run(case, planes)
        torch.testing.assert_close(result.output.double(), expected, rtol=0, atol=budget * float(expected.abs().max()))
    nothing = expected.norm(dim=-1) == 0
    assert bool(nothing.any()) == name.startswith(("some rows", "nothing"))
    assert not run_kernel(case, planes).output[nothing].any()
    if tolerance:
        certified = replace(case, tolerance=32.0)
        kernel = run_certified_kernel(certified, planes)
        check_agreement(certified, kernel, run_certified_reference(certified, planes))
        assert not kernel.output[nothing].any()


@pytest.mark.parametrize("tolerance", [*slowly(0.0), 2.0])
def test_a_sink_of_minus_infinity_changes_nothing(tolerance: float) -> None:
    case = make_case(rows=700, tolerance=tolerance)
    planes = write_planes(case)
    none = replace(case, sinks=torch.full((6,), -math.inf))
    for run in (run_kernel, run_reference):
        assert torch.equal(run(none, planes).output, run(case, planes).output)


@pytest.mark.parametrize(
    "sink", [45.0, pytest.param(80.0, marks=pytest.mark.slow), 300.0, pytest.param(math.nan, marks=pytest.mark.slow)]
)
def test_a_sink_that_takes_nearly_everything(sink: float) -> None:
    """What it leaves is right as far as float32 holds it, whose squares it leaves long before."""
    case = make_case(rows=700, peak=0.3, sinks=torch.full((6,), sink), tolerance=2.0)
    planes, expected = write_planes(case), exact(case)
    for run in (run_kernel, run_reference, lambda case, planes: run_scanned(case, planes)[0], run_certified_kernel):
        for each in (case, without_planes(case)):
            output = run(each, planes).output
            assert torch.equal(output.isnan(), expected.isnan())
            if sink < 80:
                assert added_error_in_rho(case, output).max() <= 4 * case.tolerance
            elif sink == sink:
                assert float(output.abs().max()) <= 2 * float(expected.abs().max()) + 1e-38


@pytest.mark.parametrize("tolerance", [*slowly(0.0), 2.0])
def test_a_cap_far_above_the_scores_changes_nothing(tolerance: float) -> None:
    """tanh keeps its relative accuracy where its argument is tiny."""
    case = make_case(rows=700, peak=4.0, tolerance=tolerance, softcap=1e8)
    planes = write_planes(case)
    plain = replace(case, softcap=0.0)
    for run in (run_kernel, run_reference):
        difference = relative_errors(run(case, planes).output, run(plain, planes).output.double())
        assert difference.max() <= (agreement_budget(case) if tolerance else 8 * SUM_ERROR)


@pytest.mark.parametrize("strength", [24.0, 33.0])
def test_bits_are_added_to_scores_before_the_cap(strength: float) -> None:
    """4 bits read one score far below what it is, but above the cap, which leaves nothing of the difference. Added behind the
    cap, it would change the sum of weights so much that the cache is streamed."""
    case = misread_case(strength, 6.0)
    planes = write_planes(case)
    capped = replace(case, softcap=1.0)
    for run in (run_kernel, run_reference, lambda case, planes: run_scanned(case, planes)[0]):
        counts = run(capped, planes).counts
        assert counts["key_rows_mid"] == 1
        assert counts["key_rows_full"] <= 1 < counts["rows"]
        assert added_error_in_rho(capped, run(capped, planes).output).max() <= case.tolerance
    assert run_kernel(case, planes).counts["key_rows_full"] == 40


@pytest.mark.parametrize("name", COMPILED)
def test_threads_share_a_head(name: str) -> None:
    case = variant(name, heads=1, group=6, rows=1500)
    planes = write_planes(case)
    expected, certified = run_reference(case, planes), run_certified_reference(replace(case, tolerance=8.0), planes)
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            kernel = run_kernel(case, planes)
            assert relative_errors(kernel.output, expected.output.double()).max() <= agreement_budget(case)
            check_counts(kernel.counts, expected.counts)
            check_agreement(case, run_certified_kernel(replace(case, tolerance=8.0), planes), certified)
            whole = replace(case, tolerance=0.0)
            assert relative_errors(run_kernel(whole, planes).output, exact(whole)).max() <= 8 * SUM_ERROR
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in (torch.float16, torch.float32, torch.float64))],
)
def test_sinks_of_every_dtype_and_stride(dtype: torch.dtype) -> None:
    case = without_planes(make_case(rows=200, sinks=torch.randn(12).to(dtype)[::2]))
    assert relative_errors(run_kernel(case, None).output, exact(case)).max() <= 8 * SUM_ERROR


ULPS = 4
PROGRAM = """
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
{constants}
{vectors}
extern "C" void run(const float* x, float* out, int64_t count) {{
  for (int64_t i = 0; i < count; i += VL) store(out + i, vtanh(load(x + i)));
}}
"""


def test_tanh_is_within_a_few_units_in_the_last_place(tmp_path: Path) -> None:
    """From the smallest normal numbers to infinity, over every exponent and around 0.1 to 10."""
    target = TARGETS["portable"]
    vectors = render("vectors.h.jinja", layout=layout, lanes=target.lanes, target=target.text())
    source, library = tmp_path / "tanh.cpp", tmp_path / "tanh.so"
    source.write_text(PROGRAM.format(constants=print_cpp(SHARED), vectors=vectors))
    subprocess.run(["g++", "-std=c++20", "-O2", "-w", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    exponents = torch.arange(-126, 128).repeat_interleave(64).float().exp2() * torch.rand(64 * 254).add(1.0)
    numbers = torch.cat([exponents, torch.logspace(-1, 1, 100_000), torch.tensor([0.0, math.inf, math.nan, 9.01, 20.0])])
    numbers = torch.nn.functional.pad(torch.cat([numbers, -numbers]), (0, -2 * len(numbers) % 16)).contiguous()
    out = torch.empty_like(numbers)
    run = ctypes.CDLL(str(library)).run
    run(ctypes.c_void_p(numbers.data_ptr()), ctypes.c_void_p(out.data_ptr()), ctypes.c_int64(len(numbers)))
    truth = numbers.double().tanh()
    assert torch.equal(out.isnan(), truth.isnan())
    assert torch.equal(out.signbit()[~truth.isnan()], numbers.signbit()[~truth.isnan()])
    spacing = torch.from_numpy(np.spacing(truth.abs().float().numpy())).double()
    errors = ((out.double() - truth).abs() / spacing)[~truth.isnan()]
    assert float(errors.max()) <= ULPS
