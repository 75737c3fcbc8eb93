"""A tiny Llama as Hugging Face users run it: forward compiled, and ``generate`` with a ``CompileConfig``."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import alignedkv_compile

pytestmark = pytest.mark.usefixtures("no_grad")


def caches(model: Any, kind: str) -> tuple[Any, Any]:
    from transformers import DynamicCache, StaticCache

    if kind == "static":
        return StaticCache(model.config, max_cache_len=128), StaticCache(model.config, max_cache_len=128)
    return DynamicCache(config=model.config), DynamicCache(config=model.config)


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_compiled_forward_follows_stock(tiny_llama: Any, kind: str) -> None:
    torch.manual_seed(1)
    compiled = torch.compile(tiny_llama.forward, backend="alignedkv", options={"strict": True})
    ours, stock = caches(tiny_llama, kind)
    prompt = torch.randint(0, 64, (1, 20))
    tiny_llama(input_ids=prompt, past_key_values=ours)  # an eager prefill, as generate does it
    tiny_llama(input_ids=prompt, past_key_values=stock)
    for _ in range(4):
        token = torch.randint(0, 64, (1, 1))
        expected = tiny_llama(input_ids=token, past_key_values=stock).logits
        torch.testing.assert_close(compiled(input_ids=token, past_key_values=ours).logits, expected, rtol=1e-5, atol=1e-5)
    for our_layer, stock_layer in zip(ours.layers, stock.layers, strict=True):
        torch.testing.assert_close(our_layer.keys, stock_layer.keys, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(our_layer.values, stock_layer.values, rtol=1e-5, atol=1e-5)
    report = alignedkv_compile.report()
    assert report.found == report.rewritten
    assert report.rewritten % 2 == 0
    assert report.rewritten > 0


def test_generate_with_a_compile_config(tiny_llama: Any) -> None:
    from transformers import CompileConfig

    config = CompileConfig(backend="alignedkv", options=None)
    config._compile_all_devices = True
    assert config.mode == "reduce-overhead"
    prompt = torch.randint(0, 64, (1, 12))
    wanted = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = tiny_llama.generate(prompt, **wanted)
    text = tiny_llama.generate(prompt, cache_implementation="static", compile_config=config, **wanted)
    assert torch.equal(text, expected)
    report = alignedkv_compile.report()
    assert report.rewritten >= 2
    assert report.declined == 0
