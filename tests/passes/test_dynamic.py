"""Attention over concatenated caches: the concatenation becomes an append to a growing buffer."""

# ruff: noqa: ANN001 - fixtures and the functions that Dynamo traces read better bare

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from alignedkv_compile.contract import Outcome
from alignedkv_compile.options import Options

DIM = 16


def step(query, key, value, past_key, past_value, mask=None):
    keys = torch.cat([past_key, key], dim=-2)
    values = torch.cat((past_value, value), 2)
    return F.scaled_dot_product_attention(query, keys, values, mask, enable_gqa=True), keys, values


def inputs(past: int = 9, rows: int = 1, batch: int = 1, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    query = torch.randn(batch, rows, 4, DIM).to(dtype).transpose(1, 2)
    return [query, *(torch.randn(batch, 2, count, DIM).to(dtype) for count in (rows, rows, past, past))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 4, 16])
@pytest.mark.parametrize("batch", [1, 2])
def test_the_concatenation_becomes_an_append(harness, same_as_stock, operations, dtype, rows: int, batch: int) -> None:
    same_as_stock(step, harness, *inputs(9, rows, batch, dtype))
    assert harness.outcomes == [Outcome.REWRITTEN]
    before, after = operations(harness.originals[-1]), operations(harness.last.module)
    assert before["cat"] == 2
    assert after["cat"] == after["scaled_dot_product_attention"] == 0
    assert after["index_copy_"] == 2
    assert after["quantize_on_write.default"] == after["aligned_read_attention.default"] == 1
    (binding,) = harness.last.caches
    assert binding.new_rows == rows
    assert len(harness.last.kept_outputs) == harness.last.outputs - 2


def test_new_rows_of_a_narrower_dtype(harness, same_as_stock) -> None:
    """As under autocast: ``cat`` gives the wider one."""
    query, key, value, *past = inputs()
    same_as_stock(step, harness, query, key.bfloat16(), value.half(), *past)
    assert harness.outcomes == [Outcome.REWRITTEN]


def test_new_rows_that_change_the_dtype_of_the_past(harness, same_as_stock) -> None:
    query, key, value, *past = inputs()
    same_as_stock(step, harness, query, key, value, *(rows.bfloat16() for rows in past))
    assert harness.outcomes == [Outcome.DECLINED]
    assert harness.reasons == ["past and new rows have different dtypes, and the past would change its own"]


def test_one_graph_for_all_lengths(harness) -> None:
    compiled = torch.compile(step, backend=harness, fullgraph=True)
    _, _, _, past_key, past_value = inputs(5)
    stock = past_key.clone(), past_value.clone()
    for _ in range(8):
        query, key, value, *_ = inputs(5)
        actual, past_key, past_value = compiled(query, key, value, past_key.contiguous(), past_value.contiguous())
        expected, *stock = step(query, key, value, *stock)
        torch.testing.assert_close(actual, expected)
        assert torch.equal(past_key, stock[0])
        assert torch.equal(past_value, stock[1])
    assert len(harness.graphs) == 2, "one graph for the first length, one symbolic in it"


@pytest.mark.parametrize("dynamic", [False, True])
def test_sizes_of_past_and_result_may_be_asked_for(harness, same_as_stock, dynamic: bool) -> None:
    def layer(query, key, value, past_key, past_value):
        offset = past_key.shape[2] + past_value.numel() - past_value.dim()
        out, keys, values = step(query + offset / 1000, key, value, past_key, past_value)
        return out * keys.shape[-2] + torch.arange(values.size(2)).sum(), keys, values

    same_as_stock(layer, harness, *inputs(), dynamic=dynamic)
    assert harness.outcomes == [Outcome.REWRITTEN]


@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_a_mask_as_long_as_the_live_rows(harness, same_as_stock, kind: torch.dtype) -> None:
    mask = torch.rand(1, 1, 1, 10) > 0.3 if kind == torch.bool else torch.randn(1, 1, 1, 10)
    same_as_stock(step, harness, *inputs(9), mask, dynamic=True)
    assert harness.outcomes == [Outcome.REWRITTEN]


def test_repeat_kv_over_a_concatenation(harness, same_as_stock) -> None:
    def layer(query, key, value, past_key, past_value):
        keys, values = torch.cat([past_key, key], -2), torch.cat([past_value, value], -2)
        wide = [tensor[:, :, None].expand(1, 2, 2, -1, DIM).reshape(1, 4, -1, DIM) for tensor in (keys, values)]
        return F.scaled_dot_product_attention(query, *wide), keys, values

    same_as_stock(layer, harness, *inputs(), dynamic=True)
    assert harness.outcomes == [Outcome.REWRITTEN]


def test_two_attentions_over_one_concatenation(harness, same_as_stock, operations) -> None:
    def layer(query, key, value, past_key, past_value):
        out, keys, values = step(query, key, value, past_key, past_value)
        return F.scaled_dot_product_attention(out, keys, values, enable_gqa=True), keys, values

    same_as_stock(layer, harness, *inputs())
    assert harness.outcomes == [Outcome.REWRITTEN] * 2
    assert operations(harness.last.module)["quantize_on_write.default"] == len(harness.last.caches) == 1


def test_tolerance_zero_appends_without_planes(make_harness, same_as_stock, operations) -> None:
    harness = make_harness(Options(tolerance=0.0))
    same_as_stock(step, harness, *inputs())
    after = operations(harness.last.module)
    assert after["quantize_on_write.default"] == after["cat"] == 0
    assert after["index_copy_"] == 2
    assert harness.last.caches[0].planes_input is None


def test_an_empty_past(harness, same_as_stock) -> None:
    same_as_stock(step, harness, *inputs(0, 3))
    assert harness.outcomes == [Outcome.REWRITTEN]


def test_a_long_query_leaves_the_concatenation_alone(harness, same_as_stock, operations) -> None:
    same_as_stock(step, harness, *inputs(9, 17))
    assert harness.outcomes == [Outcome.PREFILL]
    assert operations(harness.last.module) == operations(harness.originals[-1])
    assert harness.last.caches == ()


def test_near_miss_a_concatenation_that_nobody_keeps_is_no_cache(harness, same_as_stock) -> None:
    same_as_stock(lambda *args: step(*args)[0], harness, *inputs())
    assert harness.last.sites == ()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda o, k, v, p: (o, k, v, k.sum()), "K is also read by sum"),
        (lambda o, k, v, p: (o, k, v, p.sum()), "K's past is also read by sum"),
        (lambda o, k, v, p: (o, k, v, v[:, :, -3:]), "V is also read by getitem"),
        (lambda o, k, v, p: (o, k.mul_(2), v), "the cache is also written by mul_"),
    ],
)
def test_another_reader_of_the_rows_is_refused(harness, same_as_stock, change, reason: str) -> None:
    def layer(query, key, value, past_key, past_value):
        return change(*step(query, key, value, past_key, past_value), past_key)

    same_as_stock(layer, harness, *inputs())
    assert harness.outcomes == [Outcome.DECLINED]
    assert reason in harness.reasons[0]
    assert harness.last.caches == ()


def test_the_past_may_be_handed_on(harness, same_as_stock) -> None:
    same_as_stock(lambda *args: (*step(*args), args[3]), harness, *inputs())
    assert harness.outcomes == [Outcome.REWRITTEN]
