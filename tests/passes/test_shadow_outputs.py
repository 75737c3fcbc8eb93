"""For shadow checks a graph also returns what its reads read and made; nothing else changes."""

# ruff: noqa: ANN001 - fixtures and the functions that Dynamo traces read better bare

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.nn.functional as F

from alignedkv_compile import on_shadow
from alignedkv_compile.contract import Outcome
from alignedkv_compile.options import Options

DIM, CAPACITY, PAST = 16, 48, 20


def static_layer(query, key, value, keys, values, positions, mask):
    keys.index_copy_(2, positions, key)
    values.index_copy_(2, positions, value)
    return F.scaled_dot_product_attention(query * 2, keys, values, mask[None, None], enable_gqa=True) + 1


def dynamic_layer(query, key, value, keys, values):
    keys, values = torch.cat([keys, key], 2), torch.cat([values, value], 2)
    return F.scaled_dot_product_attention(query * 2, keys, values, enable_gqa=True) + 1, keys, values


def inputs(kind: str, rows: int = 1) -> list[torch.Tensor]:
    cached = CAPACITY if kind == "static" else PAST
    operands = [
        torch.randn(1, heads, count, DIM) for heads, count in ((4, rows), (2, rows), (2, rows), (2, cached), (2, cached))
    ]
    if kind == "static":
        positions = torch.arange(PAST, PAST + rows)
        operands += [positions, torch.arange(CAPACITY)[None] <= positions[:, None]]
    return operands


LAYERS = {"static": static_layer, "dynamic": dynamic_layer}


def checked(guarantee: str = "expected") -> Options:
    return Options(min_context=0, shadow_every=1, guarantee=guarantee)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("guarantee", ["expected", "worst_case"])
def test_operands_and_result_come_behind_the_outputs(
    make_harness, same_as_stock, operations, kind: str, guarantee: str
) -> None:
    plain, shadowed = make_harness(Options(min_context=0, guarantee=guarantee)), make_harness(checked(guarantee=guarantee))
    found = []
    remove = on_shadow(found.append)
    for harness in (plain, shadowed):
        torch.manual_seed(1)
        torch._dynamo.reset()
        same_as_stock(LAYERS[kind], harness, *inputs(kind))
    remove()
    assert shadowed.outcomes == [Outcome.REWRITTEN]
    assert operations(plain.last.module) == operations(shadowed.last.module)
    outputs = [harness.last.module.graph.output_node().args[0] for harness in (plain, shadowed)]
    (read,) = shadowed.last.shadow
    places = Counter(place.is_output for place in (read.query, read.rows.key, read.rows.value, read.result))
    assert places == {True: 2, False: 2}, "query and result are computed, K and V are inputs"
    assert len(outputs[1]) == len(outputs[0]) + 2 + (kind == "static"), "and the mask"
    assert read.site == 0
    assert (read.mask is None) == (kind == "dynamic")
    assert [check.errors.keys() for check in found] == [{0}]
    assert found[0].worst < 1, "every bit was read: the planes are stale in the harness"
    assert plain.last.shadow == ()


def test_a_prefill_returns_nothing_more(make_harness, same_as_stock) -> None:
    harness = make_harness(checked())
    same_as_stock(static_layer, harness, *inputs("static", rows=20 - 3))
    assert harness.outcomes == [Outcome.PREFILL]
    assert harness.last.shadow == ()
    assert len(harness.last.module.graph.output_node().args[0]) == harness.last.outputs


def test_an_operand_of_two_reads_is_returned_once(make_harness, same_as_stock) -> None:
    def two(query, key, value, keys, values, other_keys, other_values, positions, mask):
        query, mask = query * 2, mask[None, None]
        for cached, new in ((keys, key), (values, value), (other_keys, key), (other_values, value)):
            cached.index_copy_(2, positions, new)
        pairs = ((keys, values), (other_keys, other_values))
        return sum(F.scaled_dot_product_attention(query, *pair, mask, enable_gqa=True) for pair in pairs)

    operands = inputs("static")
    more = [torch.randn_like(operands[3]) for _ in range(2)]
    harness = make_harness(checked())
    same_as_stock(two, harness, *operands[:5], *more, *operands[5:])
    first, second = harness.last.shadow
    assert (first.query, first.mask) == (second.query, second.mask)
    assert first.result != second.result
    assert len(harness.last.module.graph.output_node().args[0]) == harness.last.outputs + 4


def test_a_read_whose_cache_is_written_again_is_not_checked(make_harness, same_as_stock) -> None:
    def two(query, key, value, keys, values, positions, mask):
        keys.index_copy_(2, positions, key)
        values.index_copy_(2, positions, value)
        first = F.scaled_dot_product_attention(query, keys, values, enable_gqa=True)
        keys.index_copy_(2, positions, key + first[:, :2])
        values.index_copy_(2, positions, value + first[:, :2])
        return first, F.scaled_dot_product_attention(query + first, keys, values, enable_gqa=True)

    harness = make_harness(checked())
    same_as_stock(two, harness, *inputs("static"))
    assert harness.outcomes == [Outcome.REWRITTEN] * 2
    assert [read.site for read in harness.last.shadow] == [1]


def test_lengths_that_are_symbols(make_harness) -> None:
    harness = make_harness(checked())
    compiled = torch.compile(dynamic_layer, backend=harness, fullgraph=True, dynamic=True)
    query, key, value, *past = inputs("dynamic")
    found = []
    remove = on_shadow(found.append)
    for _ in range(3):
        _, *past = compiled(query, key, value, *past)
    remove()
    assert len(found) == 3
    assert all(check.worst < 1 for check in found)
