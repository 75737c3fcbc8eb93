"""What comes into a cache, and whose cache it is: padded batches, prompts in chunks, chats, offloaded and quantized caches."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
from transformers import DynamicCache, QuantizedCache
from transformers.cache_utils import QuantizedLayer
from twins import (
    ALIGNED,
    CACHES,
    EVERY_BIT,
    SUMMATION,
    Twins,
    assert_same,
    generate,
    llama,
    mistral,
    new_cache,
    prompt,
    rounding_error,
    slow,
)

from alignedkv_compile.reasons import Reason


def padded(side: str) -> dict[str, torch.Tensor]:
    """Two prompts of 11 and 6 tokens with their mask."""
    tokens, mask = prompt(11), torch.ones(2, 11, dtype=torch.int64)
    hidden = slice(None, 5) if side == "left" else slice(-5, None)
    tokens[0, hidden] = mask[0, hidden] = 0
    return {"input_ids": tokens, "attention_mask": mask}


@pytest.mark.parametrize("cache", CACHES)
def test_prompts_of_different_lengths(cache: str) -> None:
    twins = Twins(llama())
    for side in ("left", "right"):
        expected = twins.generate(**padded(side), **CACHES[cache])
        if side == "left":
            alone = generate(twins.stock, input_ids=padded(side)["input_ids"][:1, 5:])
            assert torch.equal(expected.sequences[0, 11:], alone.sequences[0, 6:]), "padding is seen"
    assert not twins.backend.declined


@pytest.mark.parametrize(
    ("chunk", "cache"),
    [(4, "dynamic"), (20, "static"), pytest.param(4, "static", marks=slow), pytest.param(20, "dynamic", marks=slow)],
)
def test_a_prompt_in_chunks(chunk: int, cache: str) -> None:
    """Chunks of up to 16 tokens are aligned reads themselves."""
    twins = Twins(llama())
    twins.generate(input_ids=prompt(2 * chunk + 3), prefill_chunk_size=chunk, max_new_tokens=4, **CACHES[cache])
    assert not twins.backend.declined


def chat(model: Any, cache: Any) -> list[Any]:
    """Each turn hands the whole conversation and the cache of the turns before to ``generate``."""
    tokens, turns = torch.empty(1, 0, dtype=torch.int64), []
    for turn, rows in enumerate((9, 5, 21)):
        tokens = torch.cat([tokens, prompt(rows, batch=1, seed=turn)], 1)
        turns.append(generate(model, input_ids=tokens, past_key_values=cache, max_new_tokens=4, disable_compile=True))
        tokens = turns[-1].sequences
    return turns


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        ("llama", "dynamic"),
        pytest.param("llama", "static", marks=slow),
        pytest.param("mistral", "static", marks=slow),
        pytest.param("mistral", "dynamic", marks=slow),
    ],
)
def test_a_chat_over_one_cache(model: str, kind: str) -> None:
    twins = Twins(llama() if model == "llama" else mistral())
    expected = chat(twins.stock, new_cache(kind, twins.stock))
    for variant in twins.backend.each():
        actual = chat(twins.ours, new_cache(kind, twins.ours))
        for ours, stock in zip(actual, expected, strict=True):
            error = rounding_error(twins.stock, stock, {})
            assert_same(ours, stock, SUMMATION if variant == EVERY_BIT else error)
        assert twins.backend.rewritten


def test_another_answer_to_the_same_question() -> None:
    """The cache of a prompt is copied for each of several continuations, or cropped back to it."""
    twins = Twins(llama())

    def answers(model: Any) -> list[Any]:
        cache, question = DynamicCache(config=model.config), prompt(9, batch=1)
        found = [generate(model, input_ids=question, past_key_values=cache)]
        cache.crop(9 - cache.get_seq_length())
        for seed in (1, 2):
            fork = copy.deepcopy(cache)
            tokens = torch.cat([question, prompt(3, batch=1, seed=seed)], 1)
            found.append(generate(model, input_ids=tokens, past_key_values=fork, max_new_tokens=4))
        found.append(generate(model, input_ids=torch.cat([question, prompt(2, batch=1)], 1), past_key_values=cache))
        return found

    expected = answers(twins.stock)
    for variant in twins.backend.each():
        for ours, stock in zip(answers(twins.ours), expected, strict=True):
            assert_same(ours, stock, SUMMATION if variant == EVERY_BIT else rounding_error(twins.stock, stock, {}))
        assert twins.backend.rewritten
    assert not twins.backend.declined


class _Offloaded(DynamicCache):
    """What ``offloading=True`` does with the tensors, without the CUDA streams that transformers waits for."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        self.layers[(layer_idx + 1) % len(self.layers)].prefetch()
        rows = self.layers[layer_idx].update(key_states, value_states)
        self.layers[layer_idx].offload()
        return rows


def test_an_offloaded_cache() -> None:
    """On a CPU nothing moves, but the graph has the moves."""
    twins = Twins(llama())
    expected = generate(twins.stock, input_ids=prompt(7), past_key_values=_Offloaded(config=twins.stock.config))
    for variant in twins.backend.each():
        actual = generate(twins.ours, input_ids=prompt(7), past_key_values=_Offloaded(config=twins.stock.config))
        error = rounding_error(twins.stock, expected, {"input_ids": prompt(7)})
        assert_same(actual, expected, SUMMATION if variant == EVERY_BIT else error)
        assert not twins.backend.rewritten
        assert set(twins.backend.declined) == {Reason.REARRANGED}


class _RoundedLayer(QuantizedLayer):
    """Quantizes to int8 without a library, in the manner of the layers that need one."""

    def _quantize(self, tensor: torch.Tensor, axis: int) -> tuple[torch.Tensor, torch.Tensor]:
        scale = tensor.abs().amax(-1, keepdim=True) / 127
        return (tensor / scale).round().to(torch.int8), scale

    def _dequantize(self, q_tensor: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return q_tensor[0] * q_tensor[1]


def _rounded(model: Any) -> Any:
    cache = QuantizedCache("fp8", config=model.config)
    cache.layers = [_RoundedLayer(residual_length=5) for _ in cache.layers]
    return cache


QUANTIZED = {"fp8": lambda model: QuantizedCache("fp8", config=model.config), "int8": _rounded}


@pytest.mark.parametrize("kind", ["fp8", pytest.param("int8", marks=slow)])
def test_a_quantized_cache_is_left_to_stock(kind: str) -> None:
    twins = Twins(llama())
    expected = generate(twins.stock, input_ids=prompt(7), past_key_values=QUANTIZED[kind](twins.stock))
    for _ in twins.backend.each():
        actual = generate(twins.ours, input_ids=prompt(7), past_key_values=QUANTIZED[kind](twins.stock))
        assert_same(actual, expected, SUMMATION)
        assert not twins.backend.rewritten
        assert set(twins.backend.declined) <= {Reason.UNKNOWN_ATTENTION, Reason.SECOND_READER, Reason.REARRANGED}
    sites = [site for graph in twins.backend.graphs for site in graph[ALIGNED].sites]
    assert all(site.reason for site in sites)
