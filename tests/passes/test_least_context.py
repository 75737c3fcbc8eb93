"""The context below which a rewritten site reads every bit: the user's, or what pays on the device."""

# ruff: noqa: ANN001 - functions that Dynamo traces read better bare

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from alignedkv_compile import break_even
from alignedkv_compile.break_even import ReadShape
from alignedkv_compile.layout import BLOCK_ROWS
from alignedkv_compile.options import Options
from alignedkv_compile.passes import rewrite_graph
from alignedkv_compile.torch_private import FakeTensorMode

ROWS = 2**18
"""Of the cache."""


def layer(query, key, value, key_cache, value_cache, positions):
    key_cache.index_copy_(2, positions, key)
    value_cache.index_copy_(2, positions, value)
    return F.scaled_dot_product_attention(query, key_cache, value_cache, enable_gqa=True)


def site_and_argument(options: Options, device: str) -> tuple[str, int, int]:
    """The report's reason for a decode step's site, what its read has as ``min_context``, and how often planes are written."""
    reason, arguments, writes = site_and_arguments(options, device)
    return reason, arguments["min_context"], writes


def site_and_arguments(options: Options, device: str = "cpu") -> tuple[str, dict[str, Any], int]:
    """The same with all named arguments of the read."""
    found = []

    def backend(gm, example_inputs):
        found.append(rewrite_graph(gm, example_inputs, options=options))
        return gm.forward

    with FakeTensorMode():
        query, key, cache = (torch.empty(1, heads, rows, 16, device=device) for heads, rows in ((4, 1), (2, 1), (2, ROWS)))
        inputs = query, key, key.clone(), cache, cache.clone(), torch.zeros(1, dtype=torch.int64, device=device)
        torch.compile(layer, backend=backend, fullgraph=True)(*inputs)
    (rewritten,) = found
    (read,) = [node for node in rewritten.module.graph.nodes if "read_attention" in str(node.target)]
    writes = [node for node in rewritten.module.graph.nodes if "quantize_on_write" in str(node.target)]
    return rewritten.sites[0].reason, read.kwargs, len(writes)


def read(device: str, pairs: int = 1, capacity: int | None = None) -> ReadShape:
    return ReadShape(torch.device(device), torch.bfloat16, pairs, 4, 64, 64, capacity)


def test_cpus_read_every_bit_below_512_rows() -> None:
    assert break_even.least_context(read("cpu")) == break_even.LEAST_CONTEXT == 512


@pytest.mark.parametrize("processors", [16, 132])
@pytest.mark.parametrize("pairs", [1, 8, 64, 4096])
def test_on_a_gpu_pairs_share_the_rows(monkeypatch: pytest.MonkeyPatch, processors: int, pairs: int) -> None:
    monkeypatch.setattr(break_even, "_processors", lambda device: processors)
    least = break_even.least_context(read("cuda", pairs))
    rows = break_even.ROWS_PER_PROCESSOR * processors
    assert least % BLOCK_ROWS == 0
    assert least == 512 or rows <= least * pairs < rows + BLOCK_ROWS * pairs
    assert least >= break_even.LEAST_CONTEXT


def test_a_device_that_is_not_there_counts_as_an_h200() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert break_even.least_context(read("cuda", 8)) == 16896


def test_what_a_cache_can_reach() -> None:
    assert read("cpu").can_reach(10**6)
    assert not read("cpu").can_reach(break_even.NEVER)
    assert read("cpu", capacity=512).can_reach(512)
    assert not read("cpu", capacity=511).can_reach(512)


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
@pytest.mark.parametrize("asked", [None, 77])
def test_the_report_says_below_which_context_every_bit_is_read(device: str, asked: int | None) -> None:
    reason, argument, writes = site_and_argument(Options(min_context=asked), device)
    if asked is not None:
        assert argument == asked
    elif device == "cpu":
        assert argument == 512
    else:
        assert argument > 512
    assert (reason == "") is (device == "cpu")
    if device != "cpu":
        assert f"every bit below {argument} live rows" in reason
    assert writes == 1


@pytest.mark.parametrize(("asked", "writes"), [(ROWS, 1), (ROWS + 1, 0)])
def test_no_planes_are_kept_for_a_cache_that_never_reaches_the_context(asked: int, writes: int) -> None:
    reason, _, found = site_and_argument(Options(min_context=asked), "cpu")
    assert found == writes
    if not writes:
        assert f"every bit: fewer are faster from {asked} rows on, which it never holds" in reason


def test_no_planes_where_every_bit_is_always_faster() -> None:
    class Never(Options):
        def least_context(self, read: ReadShape) -> int:
            assert (read.group, read.pairs, read.capacity, read.key_dim) == (2, 2, ROWS, 16)
            return break_even.NEVER

    reason, _, writes = site_and_argument(Never(), "cpu")
    assert writes == 0
    assert "fewer are never faster here" in reason


class Measured(Options):
    """Where reads have been timed."""

    def break_even(self, read: ReadShape) -> float:
        assert (read.group, read.pairs, read.capacity, read.key_dim) == (2, 2, ROWS, 16)
        return 0.275


def test_a_read_knows_up_to_how_many_bytes_it_pays() -> None:
    reason, arguments, _ = site_and_arguments(Measured(min_context=77))
    assert arguments["break_even"] == 0.275
    assert "every bit below" not in reason
    assert "more than 28% of its bytes reads every bit" in reason


@pytest.mark.parametrize("options", [Options(), Measured(tolerance=0.0), Measured(guarantee="worst_case", tolerance=64.0)])
def test_what_is_not_measured_or_does_not_depend_on_it_is_not_said(options: Options) -> None:
    reason, arguments, _ = site_and_arguments(options)
    assert "break_even" not in arguments
    assert "of its bytes" not in reason
