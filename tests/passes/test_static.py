"""Attention over preallocated caches: fired, operations before and after, values, near-misses."""

# ruff: noqa: ANN001 - fixtures and the functions that Dynamo traces read better bare

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from alignedkv_compile.contract import Outcome
from alignedkv_compile.options import Options

ROWS, DIM = 32, 16


def repeat_kv(tensor: torch.Tensor, times: int) -> torch.Tensor:
    batch, heads, rows, dim = tensor.shape
    return tensor[:, :, None].expand(batch, heads, times, rows, dim).reshape(batch, heads * times, rows, dim)


def decode(query, key, value, key_cache, value_cache, positions, mask=None, *, how="repeat_kv", scale=None):
    """One layer of a decode step in one of the shapes that Hugging Face models give it."""
    written_key = key_cache.index_copy_(2, positions, key)
    written_value = value_cache.index_copy_(2, positions, value)
    if how == "result":
        return F.scaled_dot_product_attention(query, written_key, written_value, mask, scale=scale, enable_gqa=True)
    if how == "enable_gqa":
        return F.scaled_dot_product_attention(query, key_cache, value_cache, attn_mask=mask, enable_gqa=True, scale=scale)
    if how == "keywords":
        return F.scaled_dot_product_attention(
            query=query, key=repeat_kv(key_cache, 2), value=repeat_kv(value_cache, 2), attn_mask=mask, scale=scale
        )
    if how == "repeat_interleave":
        return F.scaled_dot_product_attention(
            query, key_cache.repeat_interleave(2, dim=1), torch.repeat_interleave(value_cache, 2, 1), mask, scale=scale
        )
    if how == "casts":
        wide = [repeat_kv(tensor, 2).to(torch.float32).contiguous() for tensor in (key_cache, value_cache)]
        return F.scaled_dot_product_attention(query.float(), *wide, mask, scale=scale).to(query.dtype)
    if how == "views":
        turned = [tensor.transpose(1, 2)[:, :, :, None].expand(-1, -1, -1, 2, -1) for tensor in (key_cache, value_cache)]
        folded = [tensor.flatten(2, 3).permute(0, 2, 1, 3) for tensor in turned]
        return F.scaled_dot_product_attention(query, *folded, mask, scale=scale)
    return F.scaled_dot_product_attention(query, repeat_kv(key_cache, 2), repeat_kv(value_cache, 2), mask, scale=scale)


SHAPES = ["repeat_kv", "result", "enable_gqa", "keywords", "repeat_interleave", "casts", "views"]


def inputs(query_rows: int = 1, batch: int = 1, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    new = [torch.randn(batch, 2, query_rows, DIM, dtype=dtype) for _ in range(2)]
    caches = [torch.randn(batch, 2, ROWS, DIM).to(dtype) for _ in range(2)]
    query = torch.randn(batch, query_rows, 4, DIM).to(dtype).transpose(1, 2)
    return [query, *new, *caches, torch.arange(5, 5 + query_rows)]


@pytest.mark.parametrize("how", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_form_is_rewritten_to_the_same_values(harness, same_as_stock, operations, how: str, dtype: torch.dtype) -> None:
    same_as_stock(lambda *args: decode(*args, how=how), harness, *inputs(dtype=dtype))
    assert harness.outcomes == [Outcome.REWRITTEN]
    before, after = operations(harness.originals[-1]), operations(harness.last.module)
    assert before["scaled_dot_product_attention"] == 1
    assert after["scaled_dot_product_attention"] == 0
    assert after["aligned_read_attention.default"] == after["quantize_on_write.default"] == 1
    assert after["index_copy_"] == 2
    gone = {"expand", "repeat_interleave"} & set(after)
    assert not gone, "the chain between cache and attention should be folded away"


@pytest.mark.parametrize("query_rows", [1, 4, 16])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("mask", ["none", "bool", "float", "rank2", "per_head"])
def test_masks_batches_and_query_lengths(harness, same_as_stock, query_rows: int, batch: int, mask: str) -> None:
    live = torch.arange(ROWS) < 5 + torch.arange(1, query_rows + 1)[:, None]
    masks: dict[str, Callable[[], torch.Tensor | None]] = {
        "none": lambda: None,
        "bool": lambda: live.expand(batch, 1, query_rows, ROWS),
        "float": lambda: torch.zeros(1, 1, query_rows, ROWS).masked_fill(~live, torch.finfo(torch.float32).min),
        "rank2": lambda: live,
        "per_head": lambda: torch.randn(1, 4, query_rows, ROWS),
    }
    same_as_stock(decode, harness, *inputs(query_rows, batch), masks[mask]())
    assert harness.outcomes == [Outcome.REWRITTEN]


def test_the_result_keeps_the_strides_that_a_recorded_view_relies_on(harness, same_as_stock) -> None:
    def layer(*args: torch.Tensor) -> torch.Tensor:
        return decode(*args).transpose(1, 2).view(1, 4, 4 * DIM)

    same_as_stock(layer, harness, *inputs(4))
    assert harness.outcomes == [Outcome.REWRITTEN]


def test_a_long_query_keeps_stock_attention_and_writes_the_planes(harness, same_as_stock, operations) -> None:
    same_as_stock(decode, harness, *inputs(17))
    assert harness.outcomes == [Outcome.PREFILL]
    after = operations(harness.last.module)
    assert after["scaled_dot_product_attention"] == after["quantize_on_write.default"] == 1
    assert after["aligned_read_attention.default"] == 0
    assert len(harness.last.caches) == 1


def test_a_causal_prefill_is_still_a_prefill(harness, same_as_stock) -> None:
    def layer(query, key, value, key_cache, value_cache, positions):
        key_cache.index_copy_(2, positions, key)
        value_cache.index_copy_(2, positions, value)
        return F.scaled_dot_product_attention(query, key_cache, value_cache, is_causal=True, enable_gqa=True)

    same_as_stock(layer, harness, *inputs(17))
    assert harness.outcomes == [Outcome.PREFILL]


@pytest.mark.parametrize("query_rows", [3, 20])
def test_a_symbolic_query_length_keeps_stock_attention(harness, same_as_stock, query_rows: int) -> None:
    same_as_stock(decode, harness, *inputs(query_rows), dynamic=True)
    assert harness.outcomes == [Outcome.PREFILL]


def test_one_graph_serves_caches_of_any_capacity(harness) -> None:
    compiled = torch.compile(lambda *args: decode(*args, how="enable_gqa"), backend=harness, fullgraph=True)
    for rows in (32, 48, 64, 96):
        query, key, value, *_, positions = inputs()
        caches = [torch.randn(1, 2, rows, DIM) for _ in range(2)]
        expected = decode(query, key, value, *(cache.clone() for cache in caches), positions, how="enable_gqa")
        torch.testing.assert_close(compiled(query, key, value, *caches, positions), expected)
    assert len(harness.graphs) == 2


def test_tolerance_zero_needs_no_planes(make_harness, same_as_stock, operations) -> None:
    harness = make_harness(Options(tolerance=0.0))
    same_as_stock(decode, harness, *inputs())
    after = operations(harness.last.module)
    assert after["aligned_read_attention.default"] == 1
    assert after["quantize_on_write.default"] == 0
    assert harness.last.caches == ()


def test_options_reach_the_operator(make_harness, same_as_stock) -> None:
    harness = make_harness(Options(tolerance=3.0, min_context=7, stats=True, accuracy=torch.float16))
    same_as_stock(lambda *args: decode(*args, scale=0.5), harness, *inputs())
    (read,) = (node for node in harness.last.module.graph.nodes if "aligned_read_attention" in str(node.target))
    expected = {"tolerance": 3.0, "min_context": 7, "unit_roundoff": 2.0**-11, "scale": 0.5, "length": ROWS, "site": 0}
    assert {name: read.kwargs[name] for name in expected} == expected
    assert harness.counters is not None
    assert harness.counters.shape[0] == 1


def two_layers(query, key, value, key_cache, value_cache, positions, *, second_writes: bool):
    first = decode(query, key, value, key_cache, value_cache, positions)
    if second_writes:
        return first, decode(query + first, key * 2, value * 3, key_cache, value_cache, positions)
    return first, F.scaled_dot_product_attention(query + first, key_cache, value_cache, enable_gqa=True)


@pytest.mark.parametrize("second_writes", [False, True])
def test_two_layers_share_one_cache(harness, same_as_stock, operations, second_writes: bool) -> None:
    same_as_stock(lambda *args: two_layers(*args, second_writes=second_writes), harness, *inputs())
    assert harness.outcomes == [Outcome.REWRITTEN] * 2
    assert len(harness.last.caches) == 1
    assert operations(harness.last.module)["quantize_on_write.default"] == 1 + second_writes


def test_another_reader_of_a_preallocated_cache_does_no_harm(harness, same_as_stock) -> None:
    same_as_stock(lambda *args: (decode(*args), args[3].sum(), args[3][:, :, :3]), harness, *inputs())
    assert harness.outcomes == [Outcome.REWRITTEN]


def test_a_mask_made_under_vmap(harness, same_as_stock) -> None:
    """transformers makes some masks so: such tensors have no storage of their own."""

    def layer(query, key, value, key_cache, value_cache, positions):
        mask = torch.vmap(lambda row: row[None] <= positions)(torch.arange(key_cache.shape[2])).T[None, None]
        return decode(query, key, value, key_cache, value_cache, positions, mask)

    same_as_stock(layer, harness, *inputs())
    assert harness.outcomes == [Outcome.REWRITTEN]


def test_new_nodes_say_where_they_come_from(harness, same_as_stock) -> None:
    same_as_stock(decode, harness, *inputs())
    for node in harness.last.module.graph.nodes:
        if "alignedkv" in str(node.target) and node.op == "call_function":
            assert "index_copy_" in node.meta["stack_trace"] or "scaled_dot_product" in node.meta["stack_trace"]
            assert "example_value" in node.meta


def test_key_and_value_may_have_different_head_dimensions(harness, same_as_stock) -> None:
    query, key, value, key_cache, value_cache, positions = inputs()
    same_as_stock(decode, harness, query, key, value[..., :11].clone(), key_cache, value_cache[..., :11].clone(), positions)
    assert harness.outcomes == [Outcome.REWRITTEN]


def test_near_miss_attention_over_no_cache_is_left_alone_silently(harness, same_as_stock) -> None:
    same_as_stock(lambda q, x: F.scaled_dot_product_attention(q, x + 1, x * 2), harness, *(torch.randn(1, 2, 4, 8),) * 2)
    assert harness.last.sites == ()
