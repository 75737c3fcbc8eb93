"""``mode="reduce-overhead"``: what is captured, and whether replays give what the uncaptured code gives.

No GPU takes part: captured code is emulated (``emulated_cuda_graphs.py``), Inductor's own checks decide. What Inductor decides
about the code that it generates for a GPU is in ``test_fake_gpu.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from emulated_cuda_graphs import EmulatedCudaGraphs, emulated_cuda_graphs
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import alignedkv_compile
from alignedkv_compile import break_even, passes
from alignedkv_compile.passes.caches.append import NO_CUDA_GRAPHS
from alignedkv_compile.runtime import Runtime

PROMPT, STEPS = 40, 6
pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture
def graphs() -> Iterator[EmulatedCudaGraphs]:
    torch._dynamo.reset()
    with emulated_cuda_graphs() as graphs:
        yield graphs


def compiled(model: Any, **options: object) -> Any:
    options = {"strict": True, "min_context": 0, "inductor": {"triton.cudagraphs": True}, **options}
    return torch.compile(model.forward, backend="alignedkv", options=options)


def tokens(seed: int) -> torch.Tensor:
    return torch.randint(0, 64, (1, PROMPT + STEPS), generator=torch.Generator().manual_seed(seed))


def static_cache(model: Any) -> Any:
    from transformers import StaticCache

    return StaticCache(model.config, max_cache_len=64)


class Decoding:
    """One cache and the tokens that go through it."""

    def __init__(self, model: Any, cache: Any, seed: int = 0) -> None:
        self.cache, self.tokens, self.position = cache, tokens(seed), PROMPT
        self.prefill(model.forward)

    def prefill(self, forward: Any) -> None:
        forward(input_ids=self.tokens[:, :PROMPT], past_key_values=self.cache)

    def step(self, forward: Any) -> torch.Tensor:
        token = self.tokens[:, self.position : self.position + 1].clone()
        self.position += 1
        return forward(input_ids=token, past_key_values=self.cache).logits.clone()


def check(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """At tolerance 2 in fp32, nothing but the last bits differs."""
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def skips() -> int:
    return counters["inductor"]["cudagraph_skips"]


def test_a_static_decode_is_recorded_once_and_replayed(
    tiny_llama: Any, graphs: EmulatedCudaGraphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(break_even, "LEAST_CONTEXT", 1)  # torch takes no options beside a mode
    forward = torch.compile(tiny_llama.forward, backend="alignedkv", mode="reduce-overhead")
    ours, stock = (Decoding(tiny_llama, static_cache(tiny_llama)) for _ in range(2))
    for _ in range(STEPS):
        check(ours.step(forward), stock.step(tiny_llama.forward))
    (decode,) = graphs.functions
    written = set(decode.function.mutated_input_idxs)
    assert len(written) == 2 * 4, "K, V, planes and cumulative_length of two layers"
    assert written <= set(decode.function.static_input_idxs)
    assert (decode.skipped, len(decode.recordings), decode.replays, skips()) == (None, 1, STEPS - 2, 0)


@pytest.mark.parametrize(
    "who", ["alignedkv without marks", *(pytest.param(who, marks=pytest.mark.slow) for who in ("alignedkv", "inductor"))]
)
def test_a_cache_first_used_by_compiled_code(
    tiny_llama: Any, graphs: EmulatedCudaGraphs, who: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers does not mark it: stock is not captured, and neither would we be."""
    if who == "alignedkv without marks":
        monkeypatch.setattr(passes, "mark_written_caches", lambda *_: None)
    forward = torch.compile(tiny_llama.forward, backend=who.split()[0], mode="reduce-overhead")
    ours, stock = (Decoding.__new__(Decoding) for _ in range(2))
    for decoding, prefill in ((ours, torch.compile(tiny_llama.forward)), (stock, tiny_llama.forward)):
        decoding.cache, decoding.tokens, decoding.position = static_cache(tiny_llama), tokens(0), PROMPT
        decoding.prefill(prefill)
    assert not hasattr(ours.cache.layers[0].keys, "_dynamo_static_input_type")
    for _ in range(STEPS):
        check(ours.step(forward), stock.step(tiny_llama.forward))
    decode = graphs.functions[-1]
    if who == "alignedkv":
        assert (decode.skipped, len(decode.recordings), skips()) == (None, 1, 0)
        return
    assert skips() == 1
    assert not decode.recordings
    assert decode.skipped is not None
    assert "mutated inputs (6 instances)" in decode.skipped, "K, V and cumulative_length of two layers"
    assert "self.layers[layer_idx].update(" in decode.skipped, "one of them is named, by where it is written"


@pytest.mark.slow
def test_two_caches_in_turn_are_two_recordings(tiny_llama: Any, graphs: EmulatedCudaGraphs) -> None:
    forward = compiled(tiny_llama)
    pairs = [[Decoding(tiny_llama, static_cache(tiny_llama), seed) for _ in range(2)] for seed in range(2)]
    for _ in range(STEPS):
        for ours, stock in pairs:
            check(ours.step(forward), stock.step(tiny_llama.forward))
    (decode,) = graphs.functions
    assert (decode.skipped, len(decode.recordings), decode.replays) == (None, 2, 2 * STEPS - 3)


@pytest.mark.slow
def test_a_cache_that_is_used_again_needs_no_new_recording(tiny_llama: Any, graphs: EmulatedCudaGraphs) -> None:
    """``reset()`` and an eager prefill make the planes stale: they are rebuilt where they are."""
    forward = compiled(tiny_llama)
    ours, stock = (Decoding(tiny_llama, static_cache(tiny_llama)) for _ in range(2))
    for seed in (0, 1):
        for decoding in (ours, stock):
            decoding.cache.reset()
            decoding.tokens, decoding.position = tokens(seed), PROMPT
            decoding.prefill(tiny_llama.forward)
        for _ in range(STEPS):
            check(ours.step(forward), stock.step(tiny_llama.forward))
    (decode,) = graphs.functions
    assert (len(decode.recordings), decode.replays) == (1, 2 * STEPS - 2)


@pytest.mark.slow
@pytest.mark.parametrize("guarantee", ["expected", "worst_case"])
def test_replays_count_as_calls_do(tiny_llama: Any, graphs: EmulatedCudaGraphs, guarantee: str) -> None:
    counted = []
    for captured in (False, True):
        torch._dynamo.reset()
        options = {"stats": True, "guarantee": guarantee, "inductor": {"triton.cudagraphs": captured}}
        forward = compiled(tiny_llama, **options)
        alignedkv_compile.reset_stats()
        decoding = Decoding(tiny_llama, static_cache(tiny_llama))
        for _ in range(STEPS):
            decoding.step(forward)
        counted.append(alignedkv_compile.stats().to_dict())
        del forward
    (decode,) = graphs.functions
    assert (decode.skipped, len(decode.recordings)) == (None, 1)
    assert counted[0] == counted[1]
    assert counted[1]["calls"] == 2 * STEPS


@pytest.mark.slow
def test_a_growing_cache_is_not_captured(tiny_llama: Any, graphs: EmulatedCudaGraphs) -> None:
    from transformers import DynamicCache

    forward = compiled(tiny_llama)
    ours, stock = (Decoding(tiny_llama, DynamicCache(config=tiny_llama.config)) for _ in range(2))
    for _ in range(STEPS):
        check(ours.step(forward), stock.step(tiny_llama.forward))
    assert not graphs.functions
    assert skips() == 0
    report = alignedkv_compile.report()
    assert report.declined == 0
    assert {graph.declined_cuda_graphs for graph in report.graphs} == {NO_CUDA_GRAPHS}
    assert NO_CUDA_GRAPHS in str(report)
    assert report.to_dict()["graphs"][0]["declined_cuda_graphs"] == NO_CUDA_GRAPHS


class Operations(TorchDispatchMode):
    """Every operation on tensors, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.slow
def test_nothing_is_done_around_a_call(tiny_llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the steady state the runtime runs no operation of its own: nothing is allocated, no host waits for a device."""
    called = Runtime.__call__
    calls = []

    def watched(self: Any, *args: object) -> object:
        graph = self._compiled

        def unwatched(*inputs: object) -> object:
            with _disable_current_modes():
                return graph(*inputs)

        self._compiled = unwatched
        try:
            with Operations() as operations:
                return called(self, *args)
        finally:
            self._compiled = graph
            calls.append(operations.names)

    monkeypatch.setattr(Runtime, "__call__", watched)
    forward = compiled(tiny_llama, stats=True)
    decoding = Decoding(tiny_llama, static_cache(tiny_llama))
    for _ in range(STEPS):
        decoding.step(forward)
    assert calls[0], "the first call builds the planes"
    assert calls[1:] == [[]] * (STEPS - 1)
