"""Sliding windows, shifted in place (static) and cropped (dynamic): what is rewritten, values over many steps, near misses."""

# ruff: noqa: ANN001 - fixtures and the functions that Dynamo traces read better bare

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from alignedkv_compile.contract import Outcome

WINDOW, DIM = 9, 16


def shift(cache: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """What ``StaticSlidingWindowLayer`` does when it is full; returns what attention reads."""
    if new.shape[2] == 1:
        rolled = cache.roll(-1, dims=-2)
        rolled[:, :, torch.tensor([-1])] = new
        cache.copy_(rolled)
        return cache
    longer = torch.cat((cache[:, :, 1:, :], new), dim=-2)
    cache.copy_(longer[:, :, -WINDOW:, :])
    return longer


def sliding_step(query, key, value, keys, values, mask):
    keys, values = shift(keys, key), shift(values, value)
    return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, enable_gqa=True)


def crop_step(query, key, value, past_key, past_value, mask):
    keys, values = torch.cat([past_key, key], -2), torch.cat([past_value, value], -2)
    kept = keys[:, :, -WINDOW + 1 :, :], values[:, :, -WINDOW + 1 :, :]
    return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, enable_gqa=True), *kept


def new_rows(rows: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [torch.randn(2, heads, rows, DIM).to(dtype) for heads in (4, 2, 2)]


def caches(rows: int = WINDOW, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [torch.randn(2, 2, rows, DIM).to(dtype) for _ in range(2)]


def make_mask(kind: str, rows: int, length: int) -> torch.Tensor | None:
    allowed = torch.rand(2, 1, rows, length) < 0.8
    allowed[..., -1] = True
    if kind == "bool":
        return allowed
    if kind == "padding":
        return allowed[:, :, :1]
    return None if kind == "none" else torch.where(allowed, torch.randn(2, 4, rows, length), torch.finfo(torch.float32).min)


@pytest.mark.parametrize("mask", ["none", "bool", "padding", "float"])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_shifted_window(harness, same_as_stock, operations, rows: int, mask: str) -> None:
    same_as_stock(sliding_step, harness, *new_rows(rows), *caches(), make_mask(mask, rows, WINDOW - 1 + rows))
    assert harness.outcomes == [Outcome.REWRITTEN]
    after = operations(harness.last.module)
    assert after["quantize_on_write.default"] == after["aligned_read_attention.default"] == 1
    assert after["copy_"] == 2, "the model's cache stays authoritative"
    assert after["scaled_dot_product_attention"] == 0


@pytest.mark.parametrize("mask", ["none", "bool", "padding", "float"])
@pytest.mark.parametrize(("past", "rows"), [(WINDOW - 1, 1), (WINDOW - 1, 3), (3, 1), (WINDOW - 2, 4)])
def test_a_cropped_window(harness, same_as_stock, operations, past: int, rows: int, mask: str) -> None:
    same_as_stock(crop_step, harness, *new_rows(rows), *caches(past), make_mask(mask, rows, past + rows))
    assert harness.outcomes == [Outcome.REWRITTEN]
    after = operations(harness.last.module)
    assert after["quantize_on_write.default"] == after["aligned_read_attention.default"] == 1
    assert after["cat"] == after["scaled_dot_product_attention"] == 0


@pytest.mark.parametrize("tolerance", [0.0, 2.0])
def test_a_shifted_window_over_many_steps(eager_backend, tolerance: float) -> None:
    backend = eager_backend(tolerance)
    step = torch.compile(sliding_step, backend=backend, fullgraph=True)
    cache, stock = caches(), None
    stock = [tensor.clone() for tensor in cache]
    for number in range(4 * WINDOW):
        if number == 17:
            for tensor in (cache[0], stock[0]):
                tensor[:, :, 4] = 2.0
        inputs, mask = new_rows(1), make_mask("bool", 1, WINDOW)
        actual, expected = step(*inputs, *cache, mask), sliding_step(*inputs, *stock, mask)
        assert (actual - expected).abs().max() < 1e-5
        assert all(map(torch.equal, cache, stock))
    assert backend.outcomes == [Outcome.REWRITTEN]
    assert len(backend.graphs) == 1


@pytest.mark.parametrize("tolerance", [0.0, 2.0])
def test_a_cropped_window_over_many_steps_forks_and_edits(eager_backend, tolerance: float) -> None:
    backend = eager_backend(tolerance)
    step = torch.compile(crop_step, backend=backend, fullgraph=True)
    cache = caches(3)
    stock = [tensor.clone() for tensor in cache]
    for number in range(4 * WINDOW):
        if number == 17:
            for tensor in (cache[0], stock[0]):
                tensor[:, :, 4] = 2.0
        inputs = new_rows(1)
        if number % 5 == 0:  # a fork that is thrown away
            step(*new_rows(1), *cache, None)
        actual, *cache = step(*inputs, *cache, None)
        expected, *stock = crop_step(*inputs, *stock, None)
        assert (actual - expected).abs().max() < 1e-5
        assert all(map(torch.equal, cache, stock))
    assert backend.outcomes == [Outcome.REWRITTEN]


def two_rows_on(cache, new):
    rolled = cache.roll(-2, dims=-2)
    rolled[:, :, torch.tensor([-1])] = new
    cache.copy_(rolled)
    return cache


def first_row_set(cache, new):
    rolled = cache.roll(-1, dims=-2)
    rolled[:, :, torch.tensor([0])] = new
    cache.copy_(rolled)
    return cache


def not_rolled_by_all(cache, new):
    rolled = cache.roll(-1, dims=-2)
    rolled[:, :, torch.tensor([-1])] = new
    rolled[:, :, torch.tensor([2])] = 0
    cache.copy_(rolled)
    return cache


def written_again(cache, new):
    shift(cache, new)
    cache.mul_(2)
    return cache


def other_rows_of_the_concatenation(cache, new):
    longer = torch.cat((cache[:, :, 2:, :], new, new), dim=-2)
    cache.copy_(longer[:, :, :WINDOW, :])
    return longer


@pytest.mark.parametrize(
    "changed", [two_rows_on, first_row_set, not_rolled_by_all, written_again, other_rows_of_the_concatenation]
)
def test_what_is_no_shift_is_left_alone(harness, same_as_stock, operations, changed) -> None:
    def step(query, key, value, keys, values):
        keys, values = changed(keys, key), changed(values, value)
        return F.scaled_dot_product_attention(query, keys, values, enable_gqa=True)

    same_as_stock(step, harness, *new_rows(1), *caches())
    assert set(harness.outcomes) <= {Outcome.DECLINED}
    assert operations(harness.last.module) == operations(harness.originals[-1])


def test_attention_before_the_shift_is_left_alone(harness, same_as_stock) -> None:
    def step(query, key, value, keys, values):
        out = F.scaled_dot_product_attention(query, keys, values, enable_gqa=True)
        shift(keys, key)
        shift(values, value)
        return out

    same_as_stock(step, harness, *new_rows(1), *caches())
    assert harness.outcomes == [Outcome.DECLINED]
    assert "before it is shifted" in harness.reasons[0]


@pytest.mark.parametrize("rows", [17])
@pytest.mark.parametrize(("step", "past"), [(sliding_step, WINDOW), (crop_step, WINDOW - 1)])
def test_long_queries_are_left_alone(harness, same_as_stock, operations, step, past: int, rows: int) -> None:
    same_as_stock(step, harness, *new_rows(rows), *caches(past), None)
    assert harness.outcomes == [Outcome.PREFILL]
    assert harness.last.caches == ()
    assert operations(harness.last.module) == operations(harness.originals[-1])


def test_a_window_that_is_returned_whole_as_well_is_left_alone(harness, same_as_stock) -> None:
    def step(query, key, value, past_key, past_value):
        keys, values = torch.cat([past_key, key], -2), torch.cat([past_value, value], -2)
        kept = keys[:, :, -WINDOW + 1 :, :], values[:, :, -WINDOW + 1 :, :]
        return F.scaled_dot_product_attention(query, keys, values, enable_gqa=True), *kept, keys.sum()

    same_as_stock(step, harness, *new_rows(1), *caches(WINDOW - 1))
    assert harness.outcomes == [Outcome.DECLINED]
    assert "K is also read by sum" in harness.reasons[0]
