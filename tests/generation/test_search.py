"""How the next tokens are chosen: greedy, sampling, beams, candidates of an assistant; each moves the cache in its own way."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
from transformers import DynamicCache
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
    prompt,
    rounding_error,
    slow,
    tiny,
)

from alignedkv_compile.contract import Outcome

WAYS = {
    "greedy": {"input_ids": prompt(7, batch=6)},
    "sampling": {"input_ids": prompt(7, batch=6), "do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.95},
    "several samples": {"input_ids": prompt(7), "do_sample": True, "num_return_sequences": 3},
    "beams": {"input_ids": prompt(7), "num_beams": 3, "num_return_sequences": 2},
    "sampled beams": {"input_ids": prompt(7), "num_beams": 3, "do_sample": True},
}
"""All with six sequences at a time, so that they share graphs."""


def noisy(model: Any, scale: float = 0.01) -> Any:
    """An assistant: the same model but for some noise, so that it is right most of the time."""
    generator = torch.Generator().manual_seed(11)
    for parameter in model.parameters():
        parameter.data += scale * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize("cache", CACHES)
def test_greedy_decoding_reads_the_cache_in_every_layer_at_every_token(cache: str) -> None:
    twins = Twins(llama(layers=2))
    twins.generate(input_ids=prompt(7), max_new_tokens=10, **CACHES[cache])
    for _ in twins.backend.each():
        assert twins.backend.rewritten == 2 * 9  # the first token comes from the prompt
        assert not twins.backend.declined
        assert not twins.backend.notes


@pytest.mark.parametrize("cache", CACHES)
def test_ways_to_choose_one_after_the_other(cache: str) -> None:
    """Beams reorder the cache at every token."""
    twins = Twins(llama())
    for way in WAYS.values():
        twins.generate(**way, **CACHES[cache])
    assert not twins.backend.declined
    assert len(twins.backend.graphs) <= 3


@slow
@pytest.mark.parametrize("cache", ["static", "dynamic"])
@pytest.mark.parametrize("model_type", ["mistral", "deepseek_v3"])
def test_beams_over_windows_and_latents(model_type: str, cache: str) -> None:
    twins = Twins(mistral() if model_type == "mistral" else tiny("DeepseekV3ForCausalLM", model_type))
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
            assert twins.backend.rewritten == 4


def test_an_assistant_whose_wrong_candidates_are_cropped() -> None:
    """Both models are compiled; the assistant generates over its own cache, which is cropped too."""
    twins, assistants = Twins(llama()), Twins(noisy(llama()))
    for do_sample in (False, True):
        inputs = {"input_ids": prompt(9, batch=1), "do_sample": do_sample, "max_new_tokens": 14}
        expected = generate(twins.stock, assistant_model=assistants.stock, **inputs)
        error = rounding_error(twins.stock, expected, {})
        for assistants.backend.selected in twins.backend.each():
            actual = generate(twins.ours, assistant_model=assistants.ours, **inputs)
            assert_same(actual, expected, SUMMATION if twins.backend.selected == EVERY_BIT else error)
    for backend in (twins.backend, assistants.backend):
        assert backend.calls[ALIGNED][Outcome.PREFILL], "the number of candidates varies"
    assert not twins.backend.declined
    assert not assistants.backend.declined


@slow
def test_an_assistant_beside_sliding_windows_that_keep_more_rows() -> None:
    """Windows record their past while candidates may be taken back, and are cut when it is known."""
    twins = Twins(mistral())
    twins.generate(input_ids=prompt(9, batch=1), assistant_model=noisy(mistral()), max_new_tokens=14, varying=True)
    assert not twins.backend.declined


@slow
def test_the_first_layer_as_the_assistant_of_all() -> None:
    """Both generate over one cache, which the assistant fills in its layer only."""
    twins = Twins(llama(layers=2))
    twins.generate(input_ids=prompt(9, batch=1), assistant_early_exit=1, max_new_tokens=10, varying=True)
    assert not twins.backend.declined


@slow
@pytest.mark.parametrize("model", ["llama", "mistral"])
def test_candidates_from_the_prompt(model: str) -> None:
    twins = Twins(llama() if model == "llama" else mistral())
    twins.generate(input_ids=prompt(6, batch=1).repeat(1, 2), prompt_lookup_num_tokens=3, max_new_tokens=14, varying=True)
    assert not twins.backend.declined


@slow
def test_no_cache_no_site() -> None:
    """Without a cache each step is a whole prefill: nothing to rewrite, nothing to decline."""
    twins = Twins(llama())
    inputs = {"input_ids": prompt(7), "use_cache": False, "max_new_tokens": 3}
    expected = generate(twins.stock, **inputs)
    for _ in twins.backend.each():
        assert_same(generate(twins.ours, **inputs), expected, SUMMATION)
    assert all(not graph[ALIGNED].sites for graph in twins.backend.graphs)
