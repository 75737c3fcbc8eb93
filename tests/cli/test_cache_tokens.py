"""``make bench-caches``, on a tiny random model: every kind of cache decodes, and holds bytes in the order of its bits."""

from __future__ import annotations

import pytest
import run_samples  # noqa: F401  puts benchmarks/ on the path
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from alignedkv_compile.demo.prefill import Past
from alignedkv_compile.storage import PACKED
from cache_tokens import BESIDE, BURST, GROWING, RECOMPILE_LIMIT, STATIC, measure

CONTEXT, LAYERS = 512, 2


@pytest.mark.parametrize("kind", [GROWING, pytest.param(STATIC, marks=pytest.mark.slow)])
@torch.no_grad()
def test_every_cache_of_a_kind_is_measured(kind: str) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64}
    config = LlamaConfig(vocab_size=64, num_hidden_layers=LAYERS, **sizes)
    model = LlamaForCausalLM(config).eval().to(torch.bfloat16)
    tokens = torch.randint(64, (1, CONTEXT + 2 * BURST))
    cache = DynamicCache(config=config)
    model(input_ids=tokens[:, :CONTEXT], past_key_values=cache)
    past = Past(config, tuple((layer.keys, layer.values) for layer in cache.layers))
    with torch.compiler.config.patch(recompile_limit=RECOMPILE_LIMIT):
        found = measure(model, past, tokens, kind, CONTEXT, rounds=1, tolerance=2.0)
    assert [one.held_as for one in found] == [BESIDE, *PACKED]
    assert all(one.token_ms > 0 for one in found)
    held = {one.held_as: one.held for one in found}
    assert held["4bit+"] < held["8bit"] < held["lossless"]
    assert held["8bit"] < 0.75 < held["lossless"]
    assert held[BESIDE] >= 1.0
