"""Reads are timed on layers that are as peaked, as coherent and as alike within a group as a model's."""

from __future__ import annotations

import pytest
import torch

from alignedkv_compile.cost import inputs
from alignedkv_compile.cost.inputs import effective_keys, made_up_cache, made_up_directions, query_factors

HEADS, ROWS, DIM, CONTEXT = 12, 3, 64, 4096


@pytest.fixture(scope="module")
def scores() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    directions = made_up_directions(HEADS, ROWS, DIM, generator)
    key, _ = made_up_cache(HEADS, CONTEXT, DIM, DIM, torch.float32, generator)
    return directions @ key.mT * DIM**-0.5


def test_effective_keys_of_query_rows_are_log_normal(scores: torch.Tensor) -> None:
    keys = effective_keys(scores * query_factors(scores)).log()
    assert keys.median().exp() == pytest.approx(inputs.MEDIAN_KEYS, rel=0.1)
    assert keys.std() == pytest.approx(inputs.SPREAD_OF_KEYS, rel=0.25), "less by what is below the least"
    assert keys.exp().min() == pytest.approx(inputs.LEAST_KEYS, rel=0.01)


def test_broader_attention_looks_at_so_many_times_as_many_keys(scores: torch.Tensor) -> None:
    median = effective_keys(scores * query_factors(scores, breadth=4.0)).log().median().exp()
    assert median == pytest.approx(4 * inputs.MEDIAN_KEYS, rel=0.1)


def test_no_row_is_asked_to_look_at_most_of_a_short_context(scores: torch.Tensor) -> None:
    short = scores[..., :128]
    assert effective_keys(short * query_factors(short)).max() <= 128 * inputs.MOST_OF_CONTEXT * 1.01


def test_query_rows_of_a_head_agree(scores: torch.Tensor) -> None:
    alike = torch.stack([torch.corrcoef(rows)[0, 1] for rows in scores])
    assert alike.mean() == pytest.approx(inputs.SHARED_DIRECTION, abs=0.1)
    assert abs(float(torch.corrcoef(scores[:, 0])[0, 1])) < 0.1, "rows of different heads do not"


def test_values_share_a_mean_and_keys_do_not() -> None:
    key, value = made_up_cache(4, CONTEXT, 32, 128, torch.bfloat16, torch.Generator().manual_seed(0))
    assert (key.shape, value.shape, key.dtype) == ((4, CONTEXT, 32), (4, CONTEXT, 128), torch.bfloat16)

    def share(rows: torch.Tensor) -> float:
        return float((rows.float().mean(1).square().sum(-1) / rows.float().square().sum(-1).mean(1)).mean())

    assert share(value) == pytest.approx(inputs.SHARED_VALUE, abs=0.04)
    assert share(key) < 0.01


def test_as_peaked_whatever_the_length_of_the_query(scores: torch.Tensor) -> None:
    torch.testing.assert_close(query_factors(scores * 2) * 2, query_factors(scores), rtol=1e-4, atol=0)
