"""Reads are timed while a compiler compiles something else: with real tensors, and leaving the user's random numbers alone."""

from __future__ import annotations

from collections import Counter
from functools import partial

import pytest
import torch
import torch.nn.functional as F

import alignedkv_compile
from alignedkv_compile.break_even import ReadShape
from alignedkv_compile.cost import measure as measuring
from alignedkv_compile.cost import options as priced_options
from alignedkv_compile.cost.measure import Accuracy, heads_of_a_call, measure
from alignedkv_compile.cost.records import Records
from alignedkv_compile.layout import PLANES_VALID


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "CONTEXTS", (256, 1024))
    monkeypatch.setattr(measuring, "ROUNDS", 3)
    monkeypatch.setattr(measuring, "ROUNDS_BESIDE", 2)
    monkeypatch.setattr(measuring, "_flush_bytes", lambda: 2**16)


def test_both_reads_are_timed_at_every_context() -> None:
    state = torch.get_rng_state()
    read = ReadShape(torch.device("cpu"), torch.bfloat16, 2, 3, 32, 16)
    timings = measure(read, Accuracy(2.0, 2.0**-8))
    assert [timing.context for timing in timings] == [256, 1024]
    assert all(timing.aligned_ms > 0 and timing.stream_ms > 0 and timing.ratio > 0 for timing in timings)
    for timing in timings:
        (share, ratio), (fewer, _), (more, _) = timing.layers
        assert ratio == timing.ratio
        assert 0.1 < fewer < share < more < 1.2, "narrower and broader attention than a model's"
    assert torch.equal(torch.get_rng_state(), state)


def test_a_call_has_several_heads_for_each_thread_where_the_model_and_the_memory_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "CONTEXTS", (1024, 32768))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)

    def heads(pairs: int, dim: int) -> int:
        return heads_of_a_call(ReadShape(torch.device("cpu"), torch.bfloat16, pairs, 1, dim, dim))

    assert [heads(pairs, 128) for pairs in (1, 3, 8, 32)] == [1, 3, 8, 8]
    assert heads(32, 576) == 2, "of 256 MiB, each head takes 108"
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
    assert heads(32, 576) == 16, "one for each thread in any case"


def test_another_layer_is_read_in_the_same_way_before_each_timed_call() -> None:
    layers = [(torch.empty(0), torch.empty(0), torch.zeros(8, dtype=torch.uint8)) for _ in range(2)]
    calls: list[tuple[int, bool]] = []

    def call(layer: tuple[torch.Tensor, ...], breadth: int) -> None:
        number = next(index for index, one in enumerate(layers) if one is layer)
        states = {bool(planes.view(torch.int64).item() == PLANES_VALID) for _, _, planes in layers}
        breadths.append((breadth, *states))
        calls.append((number, *states))

    breadths: list[tuple[int, bool]] = []
    by_breadth = [partial(call, breadth=number) for number in range(3)]
    timing = measuring._time(1024, by_breadth, (0.3, 0.2, 0.4), layers, torch.ones(8, dtype=torch.int64))
    assert timing.context == 1024
    assert min(timing.aligned_ms, timing.stream_ms, timing.ratio) > 0
    assert timing.layers[0] == (0.3, timing.ratio)
    assert [share for share, _ in timing.layers] == [0.3, 0.2, 0.4]
    rounds, beside = measuring.ROUNDS + 1, measuring.ROUNDS_BESIDE + 1
    assert Counter(breadths) == {(0, True): 2 * rounds, (0, False): 2 * rounds, (1, True): 2 * beside, (2, True): 2 * beside}
    for before, timed in zip(calls[::2], calls[1::2], strict=True):
        assert before == (1, timed[1]), "the same read of the other layer"
        assert timed[0] == 0
    assert {call[1] for call in calls} == {True, False}


def test_compiling_a_model_measures_and_the_report_says_what_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(priced_options.ENVIRONMENT_VARIABLE)
    monkeypatch.setattr(priced_options, "RECORDS", Records())
    monkeypatch.setattr("alignedkv_compile.cost.records.least_context", lambda timings: 700)

    def step(query, key, value, keys, values, positions):  # noqa: ANN001 - Dynamo traces it
        keys.index_copy_(2, positions, key)
        values.index_copy_(2, positions, value)
        return F.scaled_dot_product_attention(query, keys, values, enable_gqa=True)

    torch.manual_seed(0)
    query, key, value = torch.randn(1, 4, 1, 32), torch.randn(1, 2, 1, 32), torch.randn(1, 2, 1, 32)
    caches = [torch.randn(1, 2, 1024, 32).bfloat16() for _ in range(2)]
    inputs = [tensor.bfloat16() for tensor in (query, key, value)]
    expected = step(*inputs, *(cache.clone() for cache in caches), torch.tensor([1023]))
    result = torch.compile(step, backend="alignedkv")(*inputs, *caches, torch.tensor([1023]))
    torch.testing.assert_close(result, expected, atol=0.02, rtol=0.02)
    (site,) = alignedkv_compile.report().graphs[0].sites
    assert "every bit below 700 live rows" in site.reason
    assert len(Records().all()) == 1
