"""``generate`` over ``alignedkv_compile.Cache``: stock's text, and compiled attention reads the planes directly."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
from transformers import DynamicCache, EncoderDecoderCache
from twins import (
    ALIGNED,
    EVERY_BIT,
    SUMMATION,
    Rewriting,
    Twins,
    assert_same,
    generate,
    llama,
    mistral,
    prompt,
    rounding_error,
    slow,
    tiny,
)

import alignedkv_compile
from alignedkv_compile.contract import Outcome
from alignedkv_compile.storage import PACKED

ROOM: dict[str, int | None] = {"growing": None, "static": 64}
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"input_ids": prompt(7, batch=6)},
    "beams": {"input_ids": prompt(7), "num_beams": 3, "num_return_sequences": 2},
    "sampling": {"input_ids": prompt(7, batch=6), "do_sample": True, "top_k": 20},
    "left padding": {
        "input_ids": prompt(7, batch=6),
        "attention_mask": torch.tensor([[0, 0, 0, 1, 1, 1, 1], *[[1] * 7] * 5]),
    },
}


def cache_for(model: Any, mode: str, room: str) -> Any:
    return alignedkv_compile.Cache(model.config, mode, ROOM[room])


@pytest.mark.parametrize("room", ["growing", pytest.param("static", marks=slow)])
def test_a_lossless_cache_generates_what_stock_does(room: str) -> None:
    model = llama()
    twins = Twins(model)
    for way, inputs in WAYS.items():
        expected = generate(model, **inputs)
        error = rounding_error(model, expected, {"input_ids": inputs["input_ids"]}) if way != "left padding" else 0.02
        for variant in twins.backend.each():
            before = twins.backend.rewritten
            actual = generate(twins.ours, past_key_values=cache_for(model, "lossless", room), **inputs)
            assert twins.backend.rewritten > before, way
            if variant == EVERY_BIT or way not in ("beams", "sampling"):  # these choose anew after the smallest change
                assert_same(actual, expected, SUMMATION if variant == EVERY_BIT else error)
    assert not twins.backend.declined


def test_a_short_prompt_of_a_static_cache_is_no_refusal() -> None:
    """It takes the first rows of the cache, causally: as those of a longer one, which is not refused either."""
    twins = Twins(llama(layers=2))
    cache = cache_for(twins.stock, "8bit", "static")
    with torch.no_grad():
        twins.backend.selected = ALIGNED
        actual = twins.ours(prompt(7), past_key_values=cache).logits
        expected = twins.stock(prompt(7)).logits
    torch.testing.assert_close(actual, expected)
    assert cache.get_seq_length() == 7
    assert twins.backend.calls[ALIGNED][Outcome.PREFILL] == 2
    assert not twins.backend.declined


@pytest.mark.parametrize("mode", [pytest.param("8bit", marks=slow), "4bit+"])
def test_compiled_code_reads_what_eager_code_decodes(mode: str) -> None:
    """The numbers of a lossy cache differ from stock's; those of compiled and eager code may differ by order of sums only."""
    twins = Twins(llama(layers=2))
    inputs = {"input_ids": prompt(40)}
    expected = generate(twins.stock, past_key_values=cache_for(twins.stock, mode, "growing"), **inputs)
    error = rounding_error(twins.stock, expected, inputs)
    for variant in twins.backend.each():
        actual = generate(twins.ours, past_key_values=cache_for(twins.stock, mode, "growing"), **inputs)
        # the row at hand is attended to as it is in eager code, and as it is stored in compiled code
        assert_same(actual, expected, 0.25 * error if variant == EVERY_BIT else 2 * error)
        assert twins.backend.rewritten == 2 * 7


@pytest.mark.parametrize("room", ROOM)
@pytest.mark.parametrize("mode", PACKED)
def test_a_cache_needs_no_compiler(mode: str, room: str) -> None:
    model = llama()
    expected = generate(model, input_ids=prompt(7))
    actual = generate(model, past_key_values=cache_for(model, mode, room), input_ids=prompt(7))
    assert_same(actual, expected, {"lossless": SUMMATION}.get(mode, 0.05))  # of logits around 1


@slow
def test_a_growing_cache_makes_no_graph_for_its_growth() -> None:
    twins = Twins(llama())
    cache = cache_for(twins.stock, "lossless", "growing")
    generate(twins.ours, input_ids=prompt(100, batch=1), past_key_values=cache, max_new_tokens=8)
    graphs = len(twins.backend.graphs)
    assert cache.layers[0].capacity == 112
    generate(twins.ours, input_ids=prompt(140, batch=1), past_key_values=cache, max_new_tokens=130)
    assert cache.layers[0].capacity > 260
    assert len(twins.backend.graphs) <= graphs + 3  # questions and lengths vary, then the capacity does; it grew eight times


def test_layers_of_other_kinds_are_transformers_own() -> None:
    model = mistral()
    model.config.sliding_window = 10
    cache = alignedkv_compile.Cache(model.config, "lossless")
    stock = DynamicCache(config=model.config)
    assert [type(layer) for layer in cache.layers] == [type(layer) for layer in stock.layers]
    expected = generate(model, input_ids=prompt(7))
    assert_same(generate(model, input_ids=prompt(7), past_key_values=cache), expected, SUMMATION)


@slow
def test_self_attention_of_an_encoder_decoder() -> None:
    model = tiny("T5ForConditionalGeneration", "t5")
    expected = generate(model, input_ids=prompt(7))
    cache = EncoderDecoderCache(alignedkv_compile.Cache(model.config, "lossless"), DynamicCache(config=model.config))
    assert_same(generate(model, input_ids=prompt(7), past_key_values=cache), expected, SUMMATION)


@slow
def test_an_assistant_crops_the_cache() -> None:
    twins = Twins(llama())
    assistant = copy.deepcopy(twins.stock)
    for parameter in assistant.parameters():
        parameter.data += 0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(11))
    inputs = {"input_ids": prompt(7, batch=1), "assistant_model": assistant}
    expected = generate(twins.stock, **inputs)
    for _ in twins.backend.each():
        actual = generate(twins.ours, past_key_values=cache_for(twins.stock, "lossless", "growing"), **inputs)
        assert torch.equal(actual.sequences, expected.sequences)


def test_a_long_question_is_attended_as_it_is_at_hand() -> None:
    """More than sixteen rows over a cache that holds rows already: decoded rows, and the new ones in their own precision."""
    twins = Twins(llama())
    cache = cache_for(twins.stock, "8bit", "growing")
    with torch.no_grad():
        twins.backend.selected = ALIGNED
        twins.ours(prompt(20), past_key_values=cache)
        twins.ours(prompt(20, seed=6), past_key_values=cache)
    assert twins.backend.calls[ALIGNED][Outcome.PREFILL] == 1


def test_memory_planes_keeps_nothing_beside_other_caches() -> None:
    model = llama()
    backend = Rewriting({"planes": {"memory": "planes", "accuracy": "bfloat16", "min_context": 0}})
    twins = Twins(model, backend)
    for cache, aligned in ((DynamicCache(config=model.config), False), (cache_for(model, "8bit", "growing"), True)):
        with torch.no_grad():
            twins.ours(prompt(20), past_key_values=cache)
            twins.ours(prompt(1, seed=6), past_key_values=cache)
        (site,) = backend.graphs[-1]["planes"].sites
        assert site.outcome is Outcome.REWRITTEN
        assert ("memory='planes'" in site.reason) is not aligned
