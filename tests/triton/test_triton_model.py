"""A whole model's decode through the backend as Triton, in the interpreter, beside eager and the C++ path."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from triton_interpreter import interpreted

import alignedkv_compile
from alignedkv_compile import reference_head, reference_write

PROMPT, STEPS = 40, 3


@pytest.fixture(scope="module")
def llama() -> Any:
    """A random Llama of two layers with grouped-query attention, bfloat16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=128,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )
    return LlamaForCausalLM(config).eval().bfloat16()


def decode(model: Any, forward: Any, kind: str) -> torch.Tensor:
    """Logits ``[STEPS, vocabulary]`` of tokens decoded after an eager prefill."""
    from transformers import DynamicCache, StaticCache

    makers = {
        "static": lambda: StaticCache(model.config, max_cache_len=64),
        "dynamic": lambda: DynamicCache(config=model.config),
    }
    cache = makers[kind]() if kind in makers else alignedkv_compile.Cache(model.config, kind, max_cache_len=64)
    tokens = torch.randint(0, 64, (1, PROMPT + STEPS), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model(input_ids=tokens[:, :PROMPT], past_key_values=cache)
        steps = [forward(input_ids=tokens[:, i : i + 1], past_key_values=cache).logits for i in range(PROMPT, PROMPT + STEPS)]
    return torch.cat(steps, 1)[0].float()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["static", "dynamic"])
@pytest.mark.parametrize("tolerance", [0.0, 2.0])
def test_decode_as_triton(llama: Any, kind: str, tolerance: float, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"strict": True, "min_context": 0, "tolerance": tolerance, "stats": True}

    def compiled() -> Any:
        return torch.compile(llama.forward, backend="alignedkv", options=options)

    eager = decode(llama, llama.forward, kind)
    with interpreted():
        triton = decode(llama, compiled(), kind)
        counted = alignedkv_compile.stats()
    assert alignedkv_compile.report().declined == 0
    cpp = decode(llama, compiled(), kind)
    exact = decode(llama.float(), llama.forward, kind)
    llama.bfloat16()

    rounding = float((eager - exact).abs().max())  # what 16 bits cost this model anyway
    assert (triton - exact).abs().max() <= 2 * rounding
    assert (triton - cpp).abs().max() <= 2 * rounding
    assert counted.bytes_read > 0
    if tolerance:
        assert counted.bytes_read < counted.bytes_full, "planes were read"


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["lossless", "8bit", "4bit+"])
def test_decode_over_planes_as_triton(llama: Any, storage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"strict": True, "min_context": 0, "stats": True}

    def compiled() -> Any:
        return torch.compile(llama.forward, backend="alignedkv", options=options)

    cpp = decode(llama, compiled(), storage)
    with interpreted(), monkeypatch.context() as patch:
        for module in (reference_write, reference_head):  # the prompt is stored by eager code, which is to take this for a GPU
            patch.setattr(module, "score_ordered", lambda device: False)
        alignedkv_compile.reset_report()
        triton = decode(llama, compiled(), storage)
        counted = alignedkv_compile.stats()
    assert alignedkv_compile.report().declined == 0
    rounding = float((decode(llama, llama.forward, "dynamic") - decode(llama.float(), llama.forward, "dynamic")).abs().max())
    llama.bfloat16()
    assert (triton - cpp).abs().max() <= 2 * rounding
    assert 0 < counted.bytes_read < counted.bytes_full
