"""``R``, the output's norm, is estimated before V is read: what happens where the estimate is too large."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import (
    Case,
    added_error_in_rho,
    exact,
    make_case,
    misread_case,
    relative_errors,
    run_kernel,
    run_reference,
    write_planes,
)

from alignedkv_compile.precision import LARGEST_NORM_RATIO
from alignedkv_compile.reference_read import AlignedRead


@pytest.fixture
def estimates(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """``R`` of the first query row, at each choice of rows that the reference makes."""
    seen: list[float] = []
    choose = AlignedRead.choose_rows

    def recorded(self: AlignedRead) -> bool:
        chosen = choose(self)
        seen.append(float(self.radius[0]))
        return chosen

    monkeypatch.setattr(AlignedRead, "choose_rows", recorded)
    return seen


def on_heads(case: Case, heads: int) -> Case:
    """The same for each of so many heads: with two threads one is a team's, two a thread's each, three both."""
    repeated = {name: getattr(case, name).repeat(1, heads, 1, 1) for name in ("query", "key", "value")}
    return replace(case, **repeated)


@pytest.mark.parametrize("heads", [1, 2, 3])
@pytest.mark.parametrize(("strength", "score"), [(0.8, 4.0), (0.6, 6.0), (0.6, 3.0)], ids=["keys", "keys, mildly", "output"])
def test_rows_are_chosen_again_where_finer_keys_or_the_output_show_it(
    isa: str, estimates: list[float], strength: float, score: float, heads: int
) -> None:
    """One row of K is read at 4 bits as far above its value as can be; with its weight, ``R`` is too large."""
    case = on_heads(misread_case(strength, score, above=True, rows=512, tolerance=2.0), heads)
    planes = write_planes(case)
    expected = run_reference(case, planes)
    first, second = estimates[:2]
    assert estimates == [first, second] * heads
    assert second * LARGEST_NORM_RATIO < first
    kernel = run_kernel(case, planes)
    assert kernel.counts == expected.counts
    assert kernel.counts["key_rows_full"] < kernel.counts["rows"]
    assert added_error_in_rho(case, kernel.output).max() <= case.tolerance


@pytest.mark.parametrize("heads", [1, 3])
def test_an_output_far_below_the_second_estimate_has_the_cache_streamed(isa: str, estimates: list[float], heads: int) -> None:
    case = on_heads(misread_case(0.8, 5.0, above=True, rows=512, tolerance=2.0), heads)
    planes = write_planes(case)
    expected = run_reference(case, planes)
    assert len(estimates) == 2 * heads
    kernel = run_kernel(case, planes)
    assert kernel.counts == expected.counts
    assert kernel.counts["bytes_read"] > kernel.counts["bytes_full"]
    assert relative_errors(kernel.output, exact(case)).max() < 1e-5


def test_rows_of_v_that_cancel_are_read_in_full(isa: str, estimates: list[float]) -> None:
    """Flat attention over rows that come with their opposites: next to nothing is left of what they are one by one."""
    case = make_case(heads=3, group=2, rows=1024, peak=0.0)
    half = case.value[:, :, :512]
    case = replace(case, value=torch.stack([half, -half], 3).flatten(2, 3))
    planes = write_planes(case)
    kernel, expected = run_kernel(case, planes), run_reference(case, planes)
    assert len(estimates) == 2 * 3
    assert all(second * LARGEST_NORM_RATIO < first for first, second in zip(estimates[::2], estimates[1::2], strict=True))
    assert kernel.counts == expected.counts
    assert kernel.counts["value_rows_full"] >= kernel.counts["rows"]
    torch.testing.assert_close(kernel.output.double(), exact(case), rtol=0, atol=1e-6)
