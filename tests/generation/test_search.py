"""How the next tokens are chosen: greedy, sampling, beams, candidates of an assistant; each moves the cache in its own way."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
from transformers import DynamicCache
from twins import ALIGNED, EVERY_BIT, SUMMATION, Rewriting, Twins, assert_same, compiled, generate, llama, prompt, tiny

STATIC = {"cache_implementation": "static", "disable_compile": True}
CACHES = {"dynamic": {}, "static": STATIC}
WAYS = {
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.95},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampled-beams": {"num_beams": 3, "do_sample": True},
    "several-samples": {"do_sample": True, "num_return_sequences": 3},
}


def noisy(model: Any, scale: float = 0.01) -> Any:
    """An assistant: the same model but for some noise, so that it is right most of the time."""
    generator = torch.Generator().manual_seed(11)
    for parameter in model.parameters():
        parameter.data += scale * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize("cache", CACHES)
def test_greedy_decoding_reads_the_cache_in_every_layer_at_every_token(cache: str) -> None:
    twins = Twins(llama())
    twins.generate(input_ids=prompt(7), max_new_tokens=10, **CACHES[cache])
    for _ in twins.backend.each():
        assert twins.backend.rewritten == 2 * 9  # the first token comes from the prompt
        assert not twins.backend.declined
        assert not twins.backend.notes


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("way", WAYS)
def test_other_ways_to_choose(way: str, cache: str) -> None:
    twins = Twins(llama())
    twins.generate(input_ids=prompt(7), **WAYS[way], **CACHES[cache])
    assert not twins.backend.declined


@pytest.mark.parametrize(("name", "model_type"), [("MistralForCausalLM", "mistral"), ("DeepseekV3ForCausalLM", "deepseek_v3")])
@pytest.mark.parametrize("cache", CACHES)
def test_beams_over_windows_and_latents(name: str, model_type: str, cache: str) -> None:
    twins = Twins(tiny(name, model_type))
    twins.generate(input_ids=prompt(7), num_beams=3, **CACHES[cache])
    assert not twins.backend.declined


def test_groups_of_beams_and_contrastive_search_have_left_transformers() -> None:
    """Each is a repository of remote code now; when one comes back, it wants a test."""
    for way in ({"num_beams": 2, "num_beam_groups": 2, "diversity_penalty": 0.5}, {"penalty_alpha": 0.6, "top_k": 3}):
        with pytest.raises(ValueError, match="trust_remote_code"):
            generate(llama(), input_ids=prompt(7), **way)


def test_what_contrastive_search_does_with_a_cache() -> None:
    """Its remote code tries several next tokens at once: the batch is repeated, one of each group is kept."""
    twins, candidates = Twins(llama()), 3

    def search(model: Any) -> list[torch.Tensor]:
        cache = DynamicCache(config=model.config)
        logits = [model(prompt(7), past_key_values=cache).logits[:, -1]]
        for _ in range(4):
            tried = logits[-1].topk(candidates).indices.reshape(-1, 1)
            cache.batch_repeat_interleave(candidates)
            found = model(tried, past_key_values=cache).logits[:, -1]
            best = found.max(-1).values.view(-1, candidates).argmin(-1)
            chosen = best + candidates * torch.arange(len(best))
            cache.batch_select_indices(chosen)
            logits.append(found[chosen])
        return logits

    with torch.no_grad():
        expected = search(twins.stock)
        for variant in twins.backend.each():
            for ours, stock in zip(search(twins.ours), expected, strict=True):
                torch.testing.assert_close(ours, stock, rtol=0, atol=SUMMATION if variant == EVERY_BIT else 0.05)
            assert twins.backend.rewritten == 2 * 4


@pytest.mark.parametrize("do_sample", [False, True])
def test_an_assistant_whose_wrong_candidates_are_cropped(do_sample: bool) -> None:
    twins, backend = Twins(llama()), Rewriting()
    model, assistant = llama(), compiled(noisy(llama()), backend)
    stock_assistant = noisy(llama())
    inputs = {"input_ids": prompt(9, batch=1), "do_sample": do_sample, "max_new_tokens": 14}
    expected = generate(model, assistant_model=stock_assistant, **inputs)
    for backend.selected in twins.backend.each():
        actual = generate(twins.ours, assistant_model=assistant, **inputs)
        assert_same(actual, expected, SUMMATION if backend.selected == EVERY_BIT else 0.05)
        assert twins.backend.rewritten
        assert backend.rewritten
    assert not twins.backend.declined


def test_an_assistant_beside_sliding_windows_that_keep_more_rows() -> None:
    """Windows record their past while candidates may be taken back, and are cut when it is known."""
    model = tiny("MistralForCausalLM", "mistral")
    twins = Twins(model)
    twins.generate(input_ids=prompt(9, batch=1), assistant_model=noisy(tiny("MistralForCausalLM", "mistral")), max_new_tokens=14)
    assert not twins.backend.declined


@pytest.mark.parametrize("model_type", ["llama", "mistral"])
def test_candidates_from_the_prompt(model_type: str) -> None:
    model = llama() if model_type == "llama" else tiny("MistralForCausalLM", "mistral")
    twins = Twins(model)
    twins.generate(input_ids=prompt(6, batch=1).repeat(1, 2), prompt_lookup_num_tokens=3, max_new_tokens=14)
    assert not twins.backend.declined


def test_no_cache_no_site() -> None:
    """Without a cache each step is a whole prefill: nothing to rewrite, nothing to decline."""
    twins = Twins(llama())
    inputs = {"input_ids": prompt(7), "use_cache": False, "max_new_tokens": 3}
    expected = generate(twins.stock, **inputs)
    for _ in twins.backend.each():
        assert_same(generate(twins.ours, **inputs), expected, SUMMATION)
    assert all(not graph[ALIGNED].sites for graph in twins.backend.graphs)
