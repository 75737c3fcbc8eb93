"""The int8 terms that stand for the query in the score pass: how many, what they leave of a score's error, what they save."""

from __future__ import annotations

import pytest
import torch
from cases import added_error_in_rho, make_case, run_reference, write_planes

from alignedkv_compile import reference
from alignedkv_compile.layout import HEADROOM
from alignedkv_compile.options import UNIT_ROUNDOFF
from alignedkv_compile.precision import QUERY_NOISE, TERM_RATIO, evaluate, query_terms
from alignedkv_compile.reference_head import INT8_MAX, dither, hadamard
from alignedkv_compile.reference_query import Int8Query


def test_dtypes_finer_than_bfloat16_have_two_terms() -> None:
    assert {dtype: query_terms(u) for dtype, u in UNIT_ROUNDOFF.items()} == {
        torch.bfloat16: 1,
        torch.float16: 2,
        torch.float32: 2,
    }


def test_terms_are_int8_and_the_second_is_finer() -> None:
    """Whole numbers that int8 holds, halves of a step included, and at most half a step of the last term is lost."""
    ties = torch.arange(-INT8_MAX, INT8_MAX + 0.25, 0.5)[None]
    mixed = torch.cat([ties, torch.randn(4, ties.shape[1], generator=torch.Generator().manual_seed(0)), torch.zeros_like(ties)])
    for count in (1, 2):
        query = Int8Query.rounded(mixed, count)
        value = torch.zeros_like(mixed)
        for place, term in enumerate(query.terms):
            assert torch.equal(term, term.to(torch.int8).float())
            value += term * query.step / TERM_RATIO**place
        lost = (mixed - value).abs() / query.step.clamp_min(1e-30)
        assert 0.4 / TERM_RATIO ** (count - 1) < lost.max() < 0.51 / TERM_RATIO ** (count - 1)


@pytest.mark.parametrize("terms", [1, 2])
@pytest.mark.parametrize("dim", [32, 128])
def test_variance_of_a_score_read_at_8_bits(terms: int, dim: int) -> None:
    """``c_q`` times the variance that the key's own error gives it: an expectation over queries and keys.

    One term of a normal query makes 1.9, since a step of the key is 128/127 * 16/15 as wide; two leave 1.01."""
    generator = torch.Generator().manual_seed(dim)
    key, query = (hadamard(torch.randn(rows, dim, generator=generator)) for rows in (3000, 200))
    positions, scale = torch.arange(len(key)), key.abs().amax(-1) * HEADROOM
    high, middle = (plane[:, :dim].float() for plane in reference.encode(key, scale, positions))
    rounded = Int8Query.rounded(query, terms)
    scores = rounded.coarse_scores(high, dither(positions), scale, 1.0) + rounded.middle_scores(middle, scale, 1.0)
    error = scores.double() - query.double() @ key.double().T
    own = evaluate("key_coefficient", b=8, q=1.0, c_q=1.0) * query.norm(dim=-1)[:, None] * scale
    measured = float((error / own).square().mean())
    assert measured == pytest.approx(QUERY_NOISE[terms], rel=0.06 if terms == 1 else 0.02)


@pytest.mark.parametrize("shape", [{"heads": 1, "group": 1, "key_dim": 128}, {"group": 3, "peak": 4.0}], ids=["mha", "gqa"])
def test_the_second_term_saves_full_reads_of_keys(shape: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    """float16 at the same tolerance, which both keep: a tenth of the full reads at least, and bytes."""
    case = make_case(rows=1500, dtype=torch.float16, **shape)  # type: ignore[arg-type]
    planes = write_planes(case)
    two = run_reference(case, planes)
    monkeypatch.setattr(reference, "query_terms", lambda _: 1)
    one = run_reference(case, planes)
    for result in (one, two):
        assert added_error_in_rho(case, result.output).square().mean().sqrt() <= case.tolerance
    assert 0 < two.counts["key_rows_full"] < 0.9 * one.counts["key_rows_full"]
    assert two.counts["bytes_read"] < one.counts["bytes_read"]
