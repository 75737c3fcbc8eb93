"""Properties of the reads that hold for every call: what must not change the result, and what must."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import SUM_ERROR, Case, exact, relative_errors, run_kernel, run_reference, without_planes, write_planes
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import COHERENT, SPECIALS, VALUES, Recipe, recipes, with_special

from alignedkv_compile import ops
from alignedkv_compile.layout import BLOCK_ROWS, SCALES_BYTES, arena_layout

EXACT_SCALES = tuple(kind for kind in VALUES if kind not in ("denormals", "tiny", "huge", "heavy tails", "one huge row"))
"""Values that a factor of 2^-3 to 2^3 neither overflows nor rounds in bfloat16."""
MODERATE = ("normal", "ties", "zeros", "repeated rows", "all equal", "large mean")
"""Values under which no weight underflows in float32, so that 0 * Inf does not hide an Inf."""
DISTINCT = tuple(kind for kind in VALUES if kind not in ("clusters", "repeated rows", "all equal", "ties"))
"""Values whose rows do not sit on a threshold together."""


def reference(case: Case) -> torch.Tensor:
    return run_reference(case, write_planes(case)).output


def largest_addend(case: Case) -> float:
    """Scale for sums whose exact value may be 0: the largest V norm."""
    return float(case.value[:, :, : case.live].float().norm(dim=-1).max().clamp_min(1e-30))


def flip_budget(case: Case) -> float:
    """Relative difference of two reads that agree but for the order of sums and the rows that it moves over a threshold."""
    return 0.25 * case.tolerance * 0.4247 * case.roundoff + 2.0**-18


@given(recipes(max_rows=300))
@example(Recipe(rows=1))
def test_tolerance_zero_is_exact(recipe: Recipe) -> None:
    case = without_planes(recipe.case())
    error = (reference(case).double() - exact(case)).norm(dim=-1).max()
    # the scores' float32 error moves every weight; |score| is at most the product of norms
    score = float(case.query.norm(dim=-1).max() * case.key.float().norm(dim=-1).max()) * case.factor
    assert float(error) <= (8 * SUM_ERROR + 2.0**-22 * score) * largest_addend(case)


@given(recipes(max_rows=300, masks=("none",), values=MODERATE), st.sampled_from(SPECIALS))
def test_nan_and_inf_propagate_like_plain_attention(recipe: Recipe, kind: str) -> None:
    case = with_special(replace(recipe, peak=min(recipe.peak, 1.0)).case(), kind)
    output, expected = reference(case), exact(case)
    assert torch.equal(output.isnan(), expected.isnan())
    infinite = expected.isinf()
    assert torch.equal(output[infinite].double(), expected[infinite])


@given(recipes(max_rows=500))
def test_a_larger_tolerance_reads_no_more(recipe: Recipe) -> None:
    """Up to one score pass: a read may notice only after it that reading everything is cheaper."""
    case = recipe.case()
    planes = write_planes(case)
    counts = [run_reference(replace(case, tolerance=recipe.tolerance * factor), planes).counts for factor in (1.0, 2.0, 8.0)]
    read = [entry["bytes_read"] for entry in counts]
    width = arena_layout(case.key, case.value)
    score_pass = width.heads * width.rows * (width.key_plane_row + width.value_plane_row + SCALES_BYTES)
    means = width.heads * width.blocks * width.block_record
    assert read[1] <= read[0] + score_pass + means
    assert read[2] <= read[1] + score_pass + means
    if read[2] < counts[2]["bytes_full"]:
        assert read[2] <= read[0] * 1.02 + means


@given(recipes(max_rows=300, values=DISTINCT), st.randoms(use_true_random=False))
def test_heads_are_independent(recipe: Recipe, random: object) -> None:
    """Permuting KV heads permutes the output, and a head alone gives what it gives among others."""
    case = replace(recipe, heads=3).case()
    order = [0, 1, 2]
    random.shuffle(order)  # type: ignore[attr-defined]
    output = reference(case).unflatten(1, (3, recipe.group))
    query = case.query.unflatten(1, (3, recipe.group))[:, order].flatten(1, 2)
    permuted = replace(case, query=query, key=case.key[:, order], value=case.value[:, order])
    # Equal but for the order of sums, which a product may choose by its operands' alignment.
    budget = flip_budget(case)
    found = reference(permuted).unflatten(1, (3, recipe.group))
    assert float(relative_errors(found, output[:, order].double()).max()) <= budget
    alone = replace(case, query=case.query[:, : recipe.group], key=case.key[:, :1], value=case.value[:, :1])
    assert float(relative_errors(reference(alone), output[:, 0].double()).max()) <= budget


@given(recipes(max_rows=300, values=DISTINCT))
def test_batch_entries_are_independent(recipe: Recipe) -> None:
    first, second = recipe.case(), replace(recipe, seed=recipe.seed ^ 1).case()
    mask = None if first.mask is None or second.mask is None else torch.cat([first.mask, second.mask])
    both = Case(
        query=torch.cat([first.query, second.query]),
        key=torch.cat([first.key, second.key]),
        value=torch.cat([first.value, second.value]),
        mask=mask,
        tolerance=recipe.tolerance,
        unit_roundoff=first.unit_roundoff,
    )
    expected = torch.cat([reference(first), reference(second)])
    assert float(relative_errors(reference(both), expected.double()).max()) <= flip_budget(first)


@given(recipes(max_rows=300, values=DISTINCT), st.integers(2, 16))
def test_equal_query_heads_of_a_group_read_what_one_would(recipe: Recipe, group: int) -> None:
    """Grouped-query attention with the same query in all heads of a group is multi-head attention, bytes included."""
    single = replace(recipe, group=1).case()
    grouped = replace(single, query=single.query.repeat_interleave(group, 1))
    one, many = (run_reference(case, write_planes(case)) for case in (single, grouped))
    # Products of one row and of several sum in different orders, so that a row on a threshold may fall on either side of it.
    flip = flip_budget(single)
    difference = relative_errors(many.output, one.output.double().repeat_interleave(group, 1))
    assert float(difference.max()) <= flip
    assert abs(many.counts["bytes_read"] - one.counts["bytes_read"]) <= 0.02 * one.counts["bytes_full"]


@given(recipes(max_rows=300, values=EXACT_SCALES), st.integers(-3, 3))
def test_powers_of_two_scale_the_output(recipe: Recipe, exponent: int) -> None:
    """V times 2^k gives the output times 2^k; K times 2^k and the query times 2^-k give the same output. Bit for bit."""
    case = replace(recipe, dtype=torch.float32 if recipe.dtype == torch.float32 else torch.bfloat16).case()
    output = reference(case)
    factor = 2.0**exponent
    assert torch.equal(reference(replace(case, value=case.value * factor)), output * factor)
    assert torch.equal(reference(replace(case, key=case.key * factor, query=case.query / factor)), output)


@given(recipes(max_rows=400), st.lists(st.integers(1, 150), min_size=1, max_size=6))
@example(Recipe(rows=2 * BLOCK_ROWS), [BLOCK_ROWS, 1])
def test_planes_do_not_depend_on_how_rows_arrive(recipe: Recipe, pieces: list[int]) -> None:
    """Written at once or in pieces, in order: the same bytes, so a prefix of the planes is the planes of the prefix."""
    case = recipe.case()
    planes = torch.zeros(arena_layout(case.key, case.value).total, dtype=torch.uint8)
    start, rows = 0, case.key.shape[2]
    for piece in [*pieces, rows]:
        stop = min(start + piece, rows)
        ops.quantize_on_write(planes, case.key[:, :, start:stop], case.value[:, :, start:stop], torch.arange(start, stop), rows)
        start = stop
    whole = write_planes(case)
    assert torch.equal(planes[8:], whole[8:])


@pytest.mark.parametrize("rows", [0, 1])
def test_empty_and_single_row_caches(rows: int) -> None:
    case = Recipe(rows=rows, group=2).case()
    output = reference(case)
    if rows == 0:
        assert not output.any()
    else:
        expected = case.value[:, :, :1].float().expand_as(output)
        torch.testing.assert_close(output, expected, rtol=2.0**-8, atol=2.0**-8 * largest_addend(case))


def test_generated_kernel_survives_rows_whose_weights_are_subnormal() -> None:
    """Found by the property below: 127 over the largest weight of 16 rows overflowed, and 0 * inf gave NaN."""
    for rows in (2, 50, 700):
        case = Recipe(heads=2, group=3, rows=rows, key_dim=64, value_dim=64, values="denormals", peak=0.3).case()
        planes = write_planes(case)
        kernel, expected = run_kernel(case, planes), run_reference(case, planes)
        assert torch.isfinite(kernel.output).all()
        assert float(relative_errors(kernel.output, expected.output.double()).max()) <= flip_budget(case)


@pytest.mark.parametrize("exponent", [-3, 2])
def test_generated_kernel_scales_with_powers_of_two(exponent: int) -> None:
    case = Recipe(heads=2, group=3, rows=700, key_dim=64, value_dim=64, peak=4.0).case()
    output = run_kernel(case, write_planes(case)).output
    assert not torch.equal(output, run_kernel(without_planes(case), write_planes(case)).output), "bits were skipped"
    factor = 2.0**exponent
    scaled = replace(case, value=case.value * factor)
    assert torch.equal(run_kernel(scaled, write_planes(scaled)).output, output * factor)
    scaled = replace(case, key=case.key * factor, query=case.query / factor)
    assert torch.equal(run_kernel(scaled, write_planes(scaled)).output, output)


@given(st.sampled_from(VALUES), st.integers(1, 700), st.sampled_from([0.3, 2.0, 6.0]), st.integers(0, 2**31), st.booleans())
def test_generated_kernel_agrees_on_hard_values(values: str, rows: int, peak: float, seed: int, masked: bool) -> None:
    """One compiled shape, every kind of values: kernel and reference take the same decisions but for rows on a threshold."""
    recipe = Recipe(heads=2, group=3, rows=rows, key_dim=64, value_dim=64, values=values, peak=peak, seed=seed)
    case = replace(recipe, mask="padding" if masked and rows > 8 else "none").case()
    planes = write_planes(case)
    kernel, expected = run_kernel(case, planes), run_reference(case, planes)
    budget = COHERENT.get(values, 1.0) * case.tolerance * 0.4247 * case.roundoff + 8 * SUM_ERROR
    assert float(relative_errors(kernel.output, expected.output.double()).max()) <= budget
    for name in ("calls", "rows", "bytes_full"):
        assert kernel.counts[name] == expected.counts[name]
