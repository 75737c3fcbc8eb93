"""Queries of several rows whose number varies: one graph for all, with stock attention, instead of a graph for each."""

# ruff: noqa: ANN001 - fixtures and the functions that Dynamo traces read better bare

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from alignedkv_compile.break_even import NEVER, ReadShape
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
@pytest.mark.parametrize(
    ("attention", "mask"),
    [*((attend, mask) for mask in ("none", "bool", "float", "one row")), (written_out, "none"), (written_out, "float")],
)
@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_one_graph_for_all_lengths(make_harness, kind: str, attention, mask: str, tolerance: float) -> None:
    harness = make_harness(Options(min_context=0, tolerance=tolerance))
    layer = (static if kind == "static" else dynamic)(attention)
    compiled = torch.compile(layer, backend=harness, fullgraph=True)
    for rows in (3, 5, 2, 16, 4, 17, 30):
        given = inputs(kind, mask, rows, past=5)
        expected = layer(*[None if one is None else one.clone() for one in given])
        torch.testing.assert_close(compiled(*given), expected, rtol=0, atol=1e-5)
        assert harness.outcomes == [Outcome.REWRITTEN if rows == 3 else Outcome.PREFILL]
    assert len(harness.graphs) == 2, "one for the first length, one for all"
    assert "the number of query rows varies" in harness.reasons[0]


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_single_rows_between_queries_of_all_lengths(eager_backend, kind: str) -> None:
    """Planes and buffers are those of a cache that a stock prefill has written, whatever its length."""
    backend = eager_backend(2.0)
    layer = (static if kind == "static" else dynamic)(attend)
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    keys, values = (rows[:, :, :0] if kind == "dynamic" else rows for rows in (torch.zeros(1, KV_HEADS, 64, DIM) for _ in "KV"))
    stock, past = [keys.clone(), values.clone()], 0
    for rows in (3, 1, 1, 5, 1, 1, 2, 1, 9, 1, 1):
        query, key, value = torch.randn(1, HEADS, rows, DIM), *(torch.randn(1, KV_HEADS, rows, DIM) for _ in "KV")
        columns = 64 if kind == "static" else past + rows
        mask = (torch.arange(columns)[None] <= past + torch.arange(rows)[:, None]).view(1, 1, rows, columns)
        arguments, positions = (query, key, value, mask), torch.arange(past, past + rows)
        actual = compiled(*arguments, keys, values, positions)
        expected = layer(*arguments, *stock, positions)
        if kind == "dynamic":
            (actual, keys, values), (expected, *stock) = actual, expected
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
        assert torch.equal(keys, stock[0])
        assert torch.equal(values, stock[1])
        past += rows
    assert len(backend.graphs) <= 4


@pytest.mark.parametrize(("rows", "outcome"), [(4, Outcome.REWRITTEN), (5, Outcome.PREFILL)])
@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_queries_of_more_rows_than_pay_keep_stock_attention(make_harness, kind: str, rows: int, outcome: Outcome) -> None:
    class AtMostFour(Options):
        def most_query_rows(self, read: ReadShape) -> int:
            return 4

    harness = make_harness(AtMostFour(min_context=0))
    layer = (static if kind == "static" else dynamic)(attend)
    given = inputs(kind, "bool", rows, past=5)
    expected = layer(*[one.clone() for one in given])
    torch.testing.assert_close(torch.compile(layer, backend=harness, fullgraph=True)(*given), expected, rtol=0, atol=1e-5)
    assert harness.outcomes == [outcome]
    if outcome is Outcome.PREFILL:
        assert "5 query rows are more than 4" in harness.reasons[0]


@pytest.mark.parametrize(("one_row_from", "planes"), [(20, True), (CAPACITY + 1, False)])
def test_a_read_of_every_bit_keeps_the_planes_of_the_others(make_harness, one_row_from: int, planes: bool) -> None:
    """Several rows want every bit; planes are written for the single tokens that come after them, if those read any."""

    class EveryBitOfSeveral(Options):
        def least_context(self, read: ReadShape) -> int:
            assert read.rows_per_head == read.query_rows * HEADS // KV_HEADS
            assert planes or read.query_rows == 1 or self.tolerance == 0, "measured though there are no planes"
            return one_row_from if read.query_rows == 1 else NEVER

    harness = make_harness(EveryBitOfSeveral())
    given = inputs("static", "bool", 6, past=25)
    expected = static(attend)(*[one.clone() for one in given])
    actual = torch.compile(static(attend), backend=harness, fullgraph=True)(*given)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    assert harness.outcomes == [Outcome.REWRITTEN]
    why = "fewer are never faster here for 6 query rows" if planes else f"fewer are faster from {one_row_from} rows on"
    assert f"every bit: {why}" in harness.reasons[0]
    targets = [str(node.target) for node in harness.last.module.graph.nodes]
    assert any("quantize_on_write" in target for target in targets) is planes
