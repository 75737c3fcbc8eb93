"""``certified_read_attention``: its certificate is never exceeded, its budget is kept, and it does leave bits out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import MISREAD, Case, certified_errors, exact, make_case, misread_case, run_certified_reference, write_planes
from hypothesis import example, given, settings
from hypothesis import strategies as st
from strategies import SPECIALS, Recipe, recipes, with_special

from alignedkv_compile import ops
from alignedkv_compile.layout import hadamard_blocks
from alignedkv_compile.reference_head import hadamard
from alignedkv_compile.reference_worst_case import linear_threshold
from alignedkv_compile.reference_write import encode
from alignedkv_compile.worst_case import CODE_SLACK, D_K, LADDER, key_slack, value_bound

FLOAT32 = 2.0**-23
"""The operator's float32 output rounds what is certified in float64, elementwise."""
SUBNORMAL = 2.0**-150
"""Half the distance of float32's smallest numbers, the output's rounding error where it is that small."""
DEEP = 15
"""Examples per example of the profile: cases are small, and a violation would be rare."""


def certified(case: Case) -> tuple[torch.Tensor, torch.Tensor, dict[str, int]]:
    """Output, certificates and counters."""
    result = run_certified_reference(case, write_planes(case))
    return result.output, result.bounds, result.counts


def check(case: Case) -> bool:
    """Assert the promise; whether any bits were left out."""
    output, bounds, counts = certified(case)
    errors = certified_errors(case, output)
    size = output.double().norm(dim=-1)[0].amin(-1).clamp_min(1e-300)
    rounding = (FLOAT32 + SUBNORMAL * output.shape[-1] ** 0.5 / size) / case.roundoff
    assert bool((errors <= bounds + rounding).all()), f"certified {bounds.tolist()}, actual {errors.tolist()}"
    assert bool((bounds <= case.tolerance * (1 + FLOAT32)).all()), f"certified {bounds.tolist()}, allowed {case.tolerance}"
    return counts["key_rows_full"] < counts["rows"]


@settings(max_examples=settings().max_examples * DEEP)
@given(recipes(max_rows=300, tolerances=(1.0, 4.0, 32.0, 256.0)))
@example(Recipe(values="clusters", rows=300, key_dim=64, value_dim=64, peak=0.3, tolerance=256.0))
@example(Recipe(values="all equal", rows=129, tolerance=256.0))
@example(Recipe(rows=7, key_dim=8, value_dim=9, values="denormals", mask="sparse", peak=0.3, tolerance=1.0, seed=4))
@example(Recipe(values="one huge row", rows=256, peak=0.0, tolerance=256.0))
def test_no_error_exceeds_its_certificate(recipe: Recipe) -> None:
    check(recipe.case())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bits_are_left_out_where_attention_is_peaked(dtype: torch.dtype) -> None:
    case = make_case(rows=900, peak=6.0, tolerance=4.0 if dtype == torch.bfloat16 else 16.0, dtype=dtype)
    output, bounds, counts = certified(case)
    assert counts["bytes_read"] < 0.8 * counts["bytes_full"]
    assert bool((certified_errors(case, output) <= bounds).all())
    assert float(bounds.min()) > 0


def test_the_bound_is_reached_within_an_order_of_magnitude_by_adversarial_rows() -> None:
    """A bound that nothing comes near would be worthless. V rows that sit at the far edge of their intervals, all on one side
    and without weights to refine, use a good part of it."""
    rows, dim = 256, 32
    case = make_case(heads=1, group=1, rows=rows, key_dim=dim, peak=0.0, tolerance=256.0, dtype=torch.float32)
    step = 1 / 8
    offsets = (torch.arange(rows) * 0.6180339887498949) % 1 - 0.5
    inside = (torch.arange(rows) % 7 - 3)[:, None] * step + (0.999 - offsets[:, None]) * step  # just below the next code
    value = inside.expand(rows, dim).clone()
    value[:, 0] = 15 / 16
    case = replace(case, value=value[None, None].float(), unit_roundoff=2.0**-8)
    output, bounds, _ = certified(case)
    errors = certified_errors(case, output)
    assert bool((errors <= bounds + FLOAT32 / case.roundoff).all())
    assert float(errors.max()) > float(bounds.max()) / 10


@pytest.mark.parametrize("above", [False, True])
@pytest.mark.parametrize(("strength", "score"), MISREAD)
def test_a_row_that_4_bits_misread_is_not_lost(strength: float, score: float, above: bool) -> None:
    """Its score is read wrong by more than any bound that ``e^d`` of a float can hold: its weight vanishes, or all others."""
    case = misread_case(strength, score, above=above)
    output, bounds, _ = certified(case)
    assert float(certified_errors(case, output)) <= float(bounds) + FLOAT32 / case.roundoff


@pytest.mark.parametrize("kind", SPECIALS)
def test_numbers_that_are_not_finite_are_read_as_they_are(kind: str) -> None:
    case = with_special(Recipe(rows=200, group=2, peak=4.0).case(), kind)
    output, bounds, counts = certified(case)
    expected = exact(case)
    assert torch.equal(output.isnan(), expected.isnan())
    finite = torch.isfinite(expected)
    torch.testing.assert_close(output[finite].double(), expected[finite], rtol=2 * FLOAT32, atol=1e-30)
    assert not bounds.any()
    assert counts["bytes_read"] >= counts["bytes_full"]


def test_tolerance_zero_and_missing_planes_read_everything() -> None:
    case = make_case(rows=600, tolerance=0.0)
    output, bounds, counts = certified(case)
    assert counts["bytes_read"] == counts["bytes_full"]
    assert not bounds.any()
    assert float(certified_errors(case, output).max()) <= FLOAT32 / case.roundoff


def test_bounds_hold_the_last_certificates_and_the_largest_of_a_run() -> None:
    bounds = torch.zeros(1, 2, 6)
    seen = torch.zeros(6)
    for seed in range(3):
        case = make_case(rows=500, peak=6.0, seed=seed, tolerance=8.0)
        alone = torch.zeros(1, 2, 6)
        planes = write_planes(case)
        ops.certified_read_attention(*case.arguments(planes), alone, 0)
        ops.certified_read_attention(*case.arguments(planes), bounds, 0)
        seen = torch.maximum(seen, alone[0, 0])
        assert torch.equal(bounds[0, 0], alone[0, 0])
        assert torch.equal(bounds[0, 1], seen)


@given(st.integers(8, 256), st.integers(0, 2**31), st.sampled_from([0.0, 1.0, 6.0]))
def test_planes_keep_half_a_step_and_the_stated_slack(dim: int, seed: int, tail: float) -> None:
    """What the bounds start from, against the arithmetic of the write: every element of a K or V row, at 4 and at 8 bits."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(40, dim, generator=generator).bfloat16()
    rows = (rows * rows.abs() ** tail).float()
    positions = torch.arange(40) + seed % 1000
    exact_mixed = hadamard_float64(rows.double())
    for numbers, truth, slack in (
        (hadamard(rows), exact_mixed, float(key_slack.subs(D_K, dim))),
        (rows, rows.double(), float(CODE_SLACK)),
    ):
        scale = numbers.abs().amax(-1) * (16 / 15)
        codes = encode(numbers, scale, positions)
        hi, mid = (codes // 16).double(), (codes % 16).double()
        dither = ((positions * 2654435769 & 0xFFFFFFFF).double() - 2**31) * 2.0**-32
        at_4 = (hi - 7.5 - dither[:, None]) * (scale[:, None].double() / 8)
        at_8 = at_4 + (mid - 7.5) * (scale[:, None].double() / 128)
        for bits, found in ((4, at_4), (8, at_8)):
            bound = scale.double() * (2.0**-bits + slack)
            assert bool(((found - truth).abs().amax(-1) <= bound).all()), bits


def hadamard_float64(rows: torch.Tensor) -> torch.Tensor:
    """The block Hadamard transform as a matrix, in float64."""
    blocks, start = [], 0
    for size in hadamard_blocks(rows.shape[-1]):
        matrix = torch.ones(1, 1, dtype=torch.float64)
        while matrix.shape[0] < size:
            matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
        blocks.append(rows[..., start : start + size] @ matrix.T * size**-0.5)
        start += size
    return torch.cat(blocks, -1)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=60), st.floats(1e-6, 1e6))
def test_linear_threshold_is_the_largest_halving_of_the_limit_that_fits(costs: list[float], allowed: float) -> None:
    cost = torch.tensor([costs], dtype=torch.float64)
    rows = torch.ones(len(costs), dtype=torch.bool)
    theta = float(linear_threshold(cost, rows, torch.tensor([allowed], dtype=torch.float64), len(costs)))
    assert float(cost[cost <= theta].sum()) <= allowed
    assert theta in [allowed * 2.0**-step for step in range(LADDER)], "so few rows never need the last resort"
    if theta < allowed:
        assert float(cost[cost <= 2 * theta].sum()) > allowed


def test_linear_threshold_of_many_equal_costs_is_the_limit_over_their_number() -> None:
    count = 2 * 2**LADDER
    rows, allowed = torch.ones(count, dtype=torch.bool), torch.tensor([8.0], dtype=torch.float64)
    lowest = 8.0 * 2.0 ** -(LADDER - 1)
    for cost in (lowest, lowest / 2):
        costs = torch.full((1, count), cost, dtype=torch.float64)
        assert float(linear_threshold(costs, rows, allowed, count)) == 8.0 / count
    assert float(linear_threshold(costs / 8, rows, allowed, count)) == 8.0


def test_value_bound_is_the_norm_of_half_steps() -> None:
    symbols = {str(s): s for s in value_bound.free_symbols}
    assert float(value_bound.subs({symbols["s_V"]: 1, symbols["D"]: 64, symbols["b"]: 4})) == pytest.approx(0.5, rel=1e-4)
