"""Graphs of real Hugging Face models, tiny and with random weights: outcomes, and values of whole decode steps."""

# ruff: noqa: ANN001 - fixtures and the functions that Dynamo traces read better bare

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch

from alignedkv_compile.contract import Outcome

transformers = pytest.importorskip("transformers")
from transformers import DynamicCache, EncoderDecoderCache, StaticCache  # noqa: E402

COMMON = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "num_hidden_layers": 2,
}
BART = {
    "d_model": 64,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "vocab_size": 128,
    "max_position_embeddings": 64,
}


def build(name: str, **changes: object) -> torch.nn.Module:
    config = getattr(transformers, f"{name}Config")(**{**COMMON, **changes})
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


def make_cache(kind: str, model: torch.nn.Module):
    return StaticCache(config=model.config, max_cache_len=40) if kind == "static" else DynamicCache(config=model.config)


def logits(model: Callable[..., object], cache, tokens: torch.Tensor) -> torch.Tensor:
    return model(tokens, past_key_values=cache).logits  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", ["static", "dynamic"])
@pytest.mark.parametrize(("name", "dtype"), [("Llama", torch.bfloat16), ("Qwen2", torch.float32), ("Qwen3", torch.float32)])
def test_decoding_computes_what_the_model_does(harness, kind: str, name: str, dtype: torch.dtype) -> None:
    model = build(name).to(dtype)
    truth_model = copy.deepcopy(model).double()
    compiled = torch.compile(model, backend=harness, fullgraph=True)
    caches = [make_cache(kind, model) for _ in range(3)]
    prompt = torch.randint(0, 128, (2, 7))
    for run, cache in zip((model, model, truth_model), caches, strict=True):
        logits(run, cache, prompt)
    for rows in (4, 1, 1):
        tokens = torch.randint(0, 128, (2, rows))
        actual, stock, truth = (
            logits(run, cache, tokens) for run, cache in zip((compiled, model, truth_model), caches, strict=True)
        )
        assert harness.outcomes == [Outcome.REWRITTEN] * 2
        error, stock_error = ((result.double() - truth).abs().max() for result in (actual, stock))
        assert error <= 2 * stock_error + 1e-6


@pytest.mark.parametrize(("rows", "outcome"), [(16, Outcome.REWRITTEN), (17, Outcome.PREFILL)])
@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_query_lengths(harness, kind: str, rows: int, outcome: Outcome) -> None:
    model = build("Llama")
    cache, stock_cache = make_cache(kind, model), make_cache(kind, model)
    prompt, tokens = torch.randint(0, 128, (1, 7)), torch.randint(0, 128, (1, rows))
    for each in (cache, stock_cache):
        logits(model, each, prompt)
    actual = logits(torch.compile(model, backend=harness, fullgraph=True), cache, tokens)
    torch.testing.assert_close(actual, logits(model, stock_cache, tokens), rtol=0, atol=1e-5)
    assert harness.outcomes == [outcome] * 2
    assert [site.where for site in harness.last.sites] == ["model.layers.0.self_attn", "model.layers.1.self_attn"]


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_an_encoder_decoder(harness, kind: str) -> None:
    if kind == "static" and torch.__version__ < (2, 12):
        pytest.skip("Dynamo of torch 2.11 fails on a filled StaticCache of cross-attention, whatever the backend")
    model = transformers.BartForConditionalGeneration(transformers.BartConfig(**BART)).eval()
    cache = EncoderDecoderCache(*(make_cache(kind, model) for _ in range(2)))
    encoded = model.model.encoder(torch.arange(9)[None])
    token = torch.tensor([[3]])
    model(encoder_outputs=encoded, decoder_input_ids=token, past_key_values=cache)
    torch.compile(model, backend=harness)(encoder_outputs=encoded, decoder_input_ids=token, past_key_values=cache)
    assert harness.outcomes == [Outcome.REWRITTEN] * 2


@pytest.mark.parametrize(
    ("name", "kind", "changes"),
    [
        ("Gemma2", "static", {"sliding_window": 40}),
        ("GPTJ", "dynamic", {"rotary_dim": 8, "bos_token_id": 0, "eos_token_id": 1}),
    ],
)
def test_attention_that_a_model_writes_out(harness, name: str, kind: str, changes: dict[str, object]) -> None:
    model = build(name, **changes)
    cache, stock_cache = make_cache(kind, model), make_cache(kind, model)
    for each in (cache, stock_cache):
        logits(model, each, torch.arange(7)[None])
    token = torch.tensor([[3]])
    actual = logits(torch.compile(model, backend=harness), cache, token)
    torch.testing.assert_close(actual, logits(model, stock_cache, token), rtol=0, atol=1e-5)
    assert harness.outcomes == [Outcome.REWRITTEN] * 2


@pytest.mark.parametrize("kind", ["static", pytest.param("dynamic", marks=pytest.mark.slow)])
def test_layers_with_sliding_windows(eager_backend, kind: str) -> None:
    model = build("Qwen2", sliding_window=9, layer_types=["sliding_attention", "full_attention"], use_sliding_window=True)
    backend = eager_backend(2.0)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    cache, stock_cache = make_cache(kind, model), make_cache(kind, model)
    for each in (cache, stock_cache):
        logits(model, each, torch.arange(7)[None])
    for rows in [1] * 6 + [4, 1, 1, 3, 1]:
        tokens = torch.randint(0, 128, (1, rows))
        torch.testing.assert_close(logits(compiled, cache, tokens), logits(model, stock_cache, tokens), rtol=0, atol=2e-5)
        outcomes = [[site.outcome for site in graph.sites] for graph in backend.graphs]
        assert [Outcome.REWRITTEN] * 2 in outcomes
        assert rows == 1 or [Outcome.PREFILL] * 2 in outcomes, "their number varies"
    for layer, stock_layer in zip(cache.layers, stock_cache.layers, strict=True):
        torch.testing.assert_close(layer.keys, stock_layer.keys, rtol=0, atol=2e-5)
        torch.testing.assert_close(layer.values, stock_layer.values, rtol=0, atol=2e-5)


def test_a_vision_tower_is_not_touched(harness) -> None:
    config = transformers.SiglipVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    model = transformers.SiglipVisionModel(config).eval()
    torch.compile(model, backend=harness)(torch.randn(1, 3, 28, 28))
    assert all(graph.sites == () for graph in harness.graphs)
