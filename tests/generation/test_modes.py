"""How a model is run: with outputs asked for, gradients on by mistake, in inference mode, in threads, beside other models."""

from __future__ import annotations

import copy
import gc
import threading
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
from transformers import CompileConfig, DynamicCache
from twins import (
    ALIGNED,
    CACHES,
    EVERY_BIT,
    SUMMATION,
    VARIANTS,
    Rewriting,
    Twins,
    assert_same,
    compiled,
    generate,
    llama,
    new_cache,
    prompt,
    rounding_error,
    slow,
)
from zoo_backend import _STORES as STORES

from alignedkv_compile.reasons import Reason
from alignedkv_compile.state.append_buffers import AppendBuffers
from alignedkv_compile.state.sidecar import NO_VERSION_COUNTER, SidecarStore

BOTH = ["static", pytest.param("dynamic", marks=slow)]


def leaves(*values: object) -> list[torch.Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def assert_close(actual: object, expected: object, budget: float = SUMMATION) -> None:
    """Tensors in any structure."""
    for ours, stock in zip(leaves(actual), leaves(expected), strict=True):
        torch.testing.assert_close(ours, stock, rtol=0, atol=budget)


@pytest.mark.parametrize("cache", BOTH)
def test_whole_attention_weights_are_stock_s(cache: str) -> None:
    """The aligned read never has them, so whoever asks gets stock attention."""
    model = llama()
    model.set_attn_implementation("eager")
    twins, inputs = Twins(model), {"input_ids": prompt(7), "output_attentions": True, "max_new_tokens": 4, **CACHES[cache]}
    expected = generate(twins.stock, **inputs)
    assert len(expected.attentions[-1]) == 1
    for _ in twins.backend.each():
        actual = generate(twins.ours, **inputs)
        assert_same(actual, expected, SUMMATION)
        assert_close(actual.attentions, expected.attentions)
        assert not twins.backend.rewritten
        assert set(twins.backend.declined) == {Reason.WEIGHTS_READ}


def test_attention_written_out_is_rewritten_where_no_weights_are_asked_for() -> None:
    model = llama()
    model.set_attn_implementation("eager")
    twins = Twins(model)
    twins.generate(input_ids=prompt(7), max_new_tokens=4, **CACHES["static"])
    assert not twins.backend.declined


def test_hidden_states_scores_and_the_cache_itself_come_back() -> None:
    twins, inputs = Twins(llama()), {"input_ids": prompt(7), "output_hidden_states": True, "max_new_tokens": 5}
    expected = twins.generate(**inputs)
    for variant in twins.backend.each():
        actual = generate(twins.ours, **inputs)
        budget = SUMMATION if variant == EVERY_BIT else 0.05
        assert_close(actual.hidden_states, expected.hidden_states, budget)
        assert_close(actual.scores, expected.scores, budget)
        assert isinstance(actual.past_key_values, DynamicCache)
        assert actual.past_key_values.get_seq_length() == 11
        for ours, stock in zip(actual.past_key_values.layers, expected.past_key_values.layers, strict=True):
            assert_close((ours.keys, ours.values), (stock.keys, stock.values), budget)
    plain = generate(twins.ours, return_dict_in_generate=False, **inputs)
    assert torch.equal(plain, expected.sequences)


@pytest.mark.parametrize("kind", CACHES)
def test_gradients_left_on(kind: str) -> None:
    """A forward over a cache with gradients is declined; outputs and gradients are stock's."""
    twins = Twins(llama().requires_grad_(True))

    def loss(model: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
        model.zero_grad()
        cache = new_cache(kind, model)
        with torch.no_grad():
            twins.stock(prompt(7), past_key_values=cache)
        logits = model(prompt(2, seed=8), past_key_values=cache).logits
        if kind == "dynamic":  # a static cache is written in place behind autograd's back, stock can't go back through it
            logits.square().mean().backward()
        return logits.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]

    with torch.enable_grad():
        expected = loss(twins.stock)
        for _ in twins.backend.each():
            assert_close(loss(twins.ours), expected)
            assert not twins.backend.rewritten
    assert set(twins.backend.declined) == {Reason.GRADIENTS}


@pytest.mark.parametrize("cache", BOTH)
def test_weights_that_require_gradients_do_not_matter_to_generate(cache: str) -> None:
    """``generate`` turns gradients off itself."""
    twins = Twins(llama().requires_grad_(True))
    with torch.enable_grad():
        twins.generate(input_ids=prompt(7), max_new_tokens=4, **CACHES[cache])
    assert not twins.backend.declined


@pytest.mark.parametrize("cache", CACHES)
def test_inference_mode(cache: str) -> None:
    """Static caches that are made in it count no versions: their planes are not trusted, and the report says so."""
    twins = Twins(llama())
    with torch.inference_mode():
        twins.generate(input_ids=prompt(7), max_new_tokens=6, **CACHES[cache])
    twins.backend.selected = ALIGNED
    assert twins.backend.notes == ({NO_VERSION_COUNTER} if cache == "static" else set())


def test_autocast_over_weights_of_float32() -> None:
    """The cache becomes float32, which new rows of V in bfloat16 are then cast to, and attention's output is bfloat16."""
    twins, inputs = Twins(llama()), {"input_ids": prompt(7), "max_new_tokens": 6}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = generate(twins.stock, **inputs)
    assert expected.past_key_values.layers[0].values.dtype == torch.float32
    error = rounding_error(twins.stock, expected, inputs)
    for _ in twins.backend.each():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            actual = generate(twins.ours, **inputs)
        assert_same(actual, expected, error)
        assert twins.backend.rewritten
    assert not twins.backend.declined


@slow
def test_inference_mode_and_back_over_one_cache() -> None:
    """A chat whose turns run in other modes than those before."""
    twins = Twins(llama())

    def chat(model: Any) -> list[Any]:
        tokens, cache, turns = prompt(7, batch=1), DynamicCache(config=model.config), []
        for number, mode in enumerate((torch.inference_mode, torch.no_grad, torch.inference_mode)):
            with mode():
                turns.append(generate(model, input_ids=tokens, past_key_values=cache, max_new_tokens=3))
            tokens = torch.cat([turns[-1].sequences, prompt(2, batch=1, seed=number)], 1)
        return turns

    expected = chat(twins.stock)
    for variant in twins.backend.each():
        for ours, stock in zip(chat(twins.ours), expected, strict=True):
            assert_same(ours, stock, SUMMATION if variant == EVERY_BIT else 0.05)
        assert twins.backend.rewritten


@pytest.mark.parametrize("cache", BOTH)
def test_threads_over_one_compiled_model(cache: str) -> None:
    """Each with a cache of its own, the graphs being there already: threads that wait for one compile it again, one by one."""
    twins = Twins(llama(layers=2), Rewriting({ALIGNED: VARIANTS[ALIGNED]}))
    prompts = [prompt(7, seed=seed) for seed in range(3)]
    generate(twins.ours, input_ids=prompts[0], max_new_tokens=12, **CACHES[cache])
    before = twins.backend.rewritten
    expected = [generate(twins.stock, input_ids=tokens, max_new_tokens=12, **CACHES[cache]) for tokens in prompts]
    found: dict[int, Any] = {}

    def work(number: int) -> None:
        try:
            found[number] = generate(twins.ours, input_ids=prompts[number], max_new_tokens=12, **CACHES[cache])
        except BaseException as error:  # shown by the test's own thread
            found[number] = error

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, stock in enumerate(expected):
        if isinstance(found[number], BaseException):
            raise found[number]
        assert_same(found[number], stock, 0.05)
    assert twins.backend.rewritten == before + 3 * 2 * 11


def test_models_of_one_process_share_nothing() -> None:
    """Two models of one class, with other weights and the same prompts, token after token in turn."""
    first, second = llama(), llama()
    for parameter in second.parameters():
        parameter.data = parameter.flip(0)
    backends = [Rewriting(), Rewriting()]
    ours = [compiled(model, backend) for model, backend in zip((first, second), backends, strict=True)]

    def decode(models: Any) -> list[torch.Tensor]:
        caches, logits = [new_cache("static", model) for model in models], []
        for step in range(5):
            tokens = prompt(6 if step == 0 else 1, seed=step)
            logits += [model(tokens, past_key_values=cache).logits for model, cache in zip(models, caches, strict=True)]
        return logits

    with torch.no_grad():
        expected = decode((first, second))
        for variant in VARIANTS:
            for backend in backends:
                backend.selected = variant
            assert_close(decode(ours), expected, SUMMATION if variant == EVERY_BIT else 0.05)
            assert [backend.rewritten for backend in backends] == [4, 4]


def test_one_cache_that_two_models_continue() -> None:
    """A model and its compiled copy take turns over one cache, as with a part of the code compiled."""
    twins = Twins(llama())

    def decode(models: Any, cache: Any) -> list[torch.Tensor]:
        return [models[n % 2](prompt(6 if n == 0 else 1, seed=n), past_key_values=cache).logits for n in range(6)]

    with torch.no_grad():
        for kind in CACHES:
            expected = decode((twins.stock, twins.stock), new_cache(kind, twins.stock))
            for variant in twins.backend.each():
                before, budget = twins.backend.rewritten, SUMMATION if variant == EVERY_BIT else 0.05
                assert_close(decode((twins.stock, twins.ours), new_cache(kind, twins.stock)), expected, budget)
                assert twins.backend.rewritten == before + 3


@pytest.mark.parametrize("cache", CACHES)
def test_what_was_kept_beside_caches_goes_with_them(cache: str) -> None:
    stores = [STORES.of(kind) for kind in (AppendBuffers, SidecarStore)]
    gc.collect()
    before = [len(store) for store in stores]
    twins = Twins(llama())
    expected = twins.generate(input_ids=prompt(7), max_new_tokens=4, **CACHES[cache])
    again = generate(twins.ours, input_ids=prompt(7), max_new_tokens=4, **CACHES[cache])
    assert [len(store) for store in stores] != before  # the last cache is still alive
    del expected, again
    gc.collect()
    assert [len(store) for store in stores] == before


def test_transformers_own_compilation_of_static_decoding() -> None:
    """``CompileConfig`` takes any callable as backend; prefill stays eager."""
    backend = Rewriting()
    model, stock = llama(), llama()
    config = CompileConfig(backend=lambda gm, inputs, **options: backend(gm, inputs), mode=None)  # type: ignore[arg-type]
    config._compile_all_devices = True
    inputs = {"input_ids": prompt(7), "cache_implementation": "static", "max_new_tokens": 8}
    expected = generate(stock, disable_compile=True, **inputs)
    for variant in backend.each():
        actual = generate(model, compile_config=copy.copy(config), **inputs)
        assert_same(actual, expected, SUMMATION if variant == EVERY_BIT else 0.05)
        assert backend.rewritten == 7
        assert not backend.notes
    assert len(backend.graphs) == 1
