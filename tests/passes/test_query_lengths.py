"""Queries of several rows whose number varies: one graph for all up to 16, padded, instead of a graph for each."""

# ruff: noqa: ANN001 - fixtures and the functions that Dynamo traces read better bare

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from alignedkv_compile.contract import Outcome
from alignedkv_compile.options import Options

DIM, HEADS, KV_HEADS, CAPACITY = 16, 4, 2, 40


def attend(query, keys, values, mask):
    return F.scaled_dot_product_attention(query, keys, values, mask, enable_gqa=True)


def written_out(query, keys, values, mask):
    """Batch and heads in one dimension, as BLOOM has them."""
    keys, values = (rows.repeat_interleave(2, 1).flatten(0, 1) for rows in (keys, values))
    scores = torch.bmm(query.flatten(0, 1), keys.transpose(1, 2)) / 4.0
    if mask is not None:
        scores = scores + mask.flatten(0, 1)
    return torch.bmm(scores.softmax(-1), values).unflatten(0, (query.shape[0], -1))


def static(attention):
    def layer(query, key, value, mask, key_cache, value_cache, positions):
        key_cache.index_copy_(2, positions, key)
        value_cache.index_copy_(2, positions, value)
        return attention(query, key_cache, value_cache, mask)

    return layer


def dynamic(attention):
    def layer(query, key, value, mask, past_key, past_value, positions):
        keys, values = torch.cat([past_key, key], 2), torch.cat([past_value, value], 2)
        return attention(query, keys, values, mask), keys, values

    return layer


def make_mask(kind: str, rows: int, past: int, columns: int) -> torch.Tensor | None:
    seen = torch.arange(columns)[None] <= past + torch.arange(rows)[:, None]
    if kind == "none":
        return None
    if kind == "one row":
        return (torch.arange(columns) < past + 1).view(1, 1, 1, columns)
    if kind == "one row of floats":
        return torch.where(torch.arange(columns) < past + 1, 0.25, -math.inf).view(1, 1, 1, columns)
    causal = seen.view(1, 1, rows, columns)
    return (
        causal if kind == "bool" else torch.where(causal, torch.randn(1, HEADS, rows, columns), torch.finfo(torch.float32).min)
    )


def inputs(kind: str, mask: str, rows: int, past: int = 13) -> list[torch.Tensor | None]:
    columns = CAPACITY if kind == "static" else past + rows
    cached = [torch.randn(1, KV_HEADS, CAPACITY if kind == "static" else past, DIM) for _ in range(2)]
    new = [torch.randn(1, KV_HEADS, rows, DIM) for _ in range(2)]
    positions = torch.arange(past, past + rows)
    return [torch.randn(1, HEADS, rows, DIM), *new, make_mask(mask, rows, past, columns), *cached, positions]


@pytest.mark.parametrize("tolerance", [0.0, 2.0])
@pytest.mark.parametrize("mask", ["none", "bool", "float", "one row", "one row of floats"])
@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_one_graph_for_all_short_queries(make_harness, kind: str, mask: str, tolerance: float) -> None:
    harness = make_harness(Options(min_context=0, tolerance=tolerance))
    layer = (static if kind == "static" else dynamic)(attend)
    compiled = torch.compile(layer, backend=harness, fullgraph=True)
    for rows in (3, 5, 2, 16, 4):
        given = inputs(kind, mask, rows)
        expected = layer(*[None if one is None else one.clone() for one in given])
        torch.testing.assert_close(compiled(*given), expected, rtol=0, atol=1e-5)
        assert harness.outcomes == [Outcome.REWRITTEN]
    assert len(harness.graphs) == 2, "one for the first length, one symbolic in it"
    compiled(*inputs(kind, mask, 17))
    assert harness.outcomes == [Outcome.PREFILL]
    assert len(harness.graphs) == 3


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_heads_folded_into_the_batch(harness, kind: str) -> None:
    layer = (static if kind == "static" else dynamic)(written_out)
    compiled = torch.compile(layer, backend=harness, fullgraph=True)
    for rows in (3, 5, 2, 16):
        given = inputs(kind, "float", rows)
        expected = layer(*[None if one is None else one.clone() for one in given])
        torch.testing.assert_close(compiled(*given), expected, rtol=0, atol=1e-5)
        assert harness.outcomes == [Outcome.REWRITTEN]
    assert len(harness.graphs) == 2


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_padding_chooses_no_rows(eager_backend, kind: str) -> None:
    """A query of 5 rows that is padded comes to the same bits as in a graph for 5 rows, where bits are skipped."""
    layer = (static if kind == "static" else dynamic)(attend)
    last = [one.bfloat16() if one is not None and one.is_floating_point() else one for one in inputs(kind, "bool", 5)]
    results = []
    for earlier in ((), (3,)):
        torch._dynamo.reset()
        compiled = torch.compile(layer, backend=eager_backend(2.0), fullgraph=True)
        for rows in earlier:
            compiled(
                *[one.bfloat16() if one is not None and one.is_floating_point() else one for one in inputs(kind, "bool", rows)]
            )
        output = compiled(*[one.clone() for one in last])
        results.append(output if kind == "static" else output[0])
    assert torch.equal(*results)
    assert not torch.equal(results[0], layer(*last) if kind == "static" else layer(*last)[0]), "every bit was read"
