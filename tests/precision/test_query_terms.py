"""The two int8 terms that stand for the query in the score pass: what they leave of a score's error, what the second saves."""

from __future__ import annotations

import pytest
import torch
from cases import added_error_in_rho, make_case, run_reference, write_planes

from alignedkv_compile import reference_query, reference_write
from alignedkv_compile.layout import HEADROOM
from alignedkv_compile.precision import INT8_MAX, TERM_RATIO, evaluate
from alignedkv_compile.reference_head import dither, hadamard
from alignedkv_compile.reference_query import Int8Query


def test_terms_are_int8_and_the_second_is_finer() -> None:
    """Whole numbers that int8 holds, halves of a step included, and at most half a step of the second term is lost."""
    ties = torch.arange(-INT8_MAX, INT8_MAX + 0.25, 0.5)[None]
    mixed = torch.cat([ties, torch.randn(4, ties.shape[1], generator=torch.Generator().manual_seed(0)), torch.zeros_like(ties)])
    query = Int8Query.rounded(mixed)
    value = torch.zeros_like(mixed)
    for place, term in enumerate(query.terms):
        assert torch.equal(term, term.to(torch.int8).float())
        value += term * query.step / TERM_RATIO**place
        lost = (mixed - value).abs() / query.step.clamp_min(1e-30)
        assert 0.4 / TERM_RATIO**place < lost.max() < 0.51 / TERM_RATIO**place
    assert len(query.terms) == 2


@pytest.mark.parametrize("dim", [32, 128])
def test_variance_of_a_score_read_at_8_bits(dim: int) -> None:
    """That of the key's own error and 1% that the mid plane leaves out: an expectation over queries and keys."""
    generator = torch.Generator().manual_seed(dim)
    key, query = (hadamard(torch.randn(rows, dim, generator=generator)) for rows in (3000, 200))
    positions, scale = torch.arange(len(key)), key.abs().amax(-1) * HEADROOM
    codes = reference_write.encode(key, scale, positions)
    hi, mid = (codes // 16).float(), (codes % 16).float()
    rounded = Int8Query.rounded(query)
    scores = rounded.hi_scores(hi, dither(positions), scale, 1.0) + rounded.mid_scores(mid, scale, 1.0)
    error = scores.double() - query.double() @ key.double().T
    own = evaluate("key_coefficient", b=8, q=1.0) * query.norm(dim=-1)[:, None] * scale
    assert float((error / own).square().mean()) == pytest.approx(1.01, abs=0.01)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("shape", [{"heads": 1, "group": 1, "key_dim": 128}, {"group": 3, "peak": 4.0}], ids=["mha", "gqa"])
def test_the_second_term_takes_error_away(
    shape: dict[str, object], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nearly the same rows are read with one term as with two, but with two the error is smaller."""
    case = make_case(rows=1500, dtype=dtype, **shape)  # type: ignore[arg-type]
    planes = write_planes(case)
    two = run_reference(case, planes)
    monkeypatch.setattr(reference_query, "QUERY_TERMS", 1)
    one = run_reference(case, planes)
    with_one, with_two = (float(added_error_in_rho(case, x.output).square().mean().sqrt()) for x in (one, two))
    assert two.counts["bytes_read"] == pytest.approx(one.counts["bytes_read"], rel=0.02)
    assert with_two <= case.tolerance
    assert with_two < 0.95 * with_one
