"""Layers that are compiled once and called each: the same numbers as from one graph, and one kernel for all of them."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import alignedkv_compile
from alignedkv_compile import torch_private

pytestmark = pytest.mark.usefixtures("no_grad")

LAYERS = 6


@pytest.fixture(scope="module")
def deep_llama() -> Any:
    """A random Llama of six layers, fp32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=LAYERS, max_position_embeddings=1024, **sizes)).eval()


@pytest.fixture
def regions(monkeypatch: pytest.MonkeyPatch) -> list[torch.fx.GraphModule]:
    """Modules of the regions that are compiled from here on."""
    modules: list[torch.fx.GraphModule] = []
    compile_region = torch_private.compile_region

    def spy(module: torch.fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
        modules.append(module)
        return compile_region(module, *args, **kwargs)

    monkeypatch.setattr(torch_private, "compile_region", spy)
    return modules


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def decode(model: Any, kind: str, compiled: Any, steps: int = 5) -> torch.Tensor:
    """Logits of some tokens after an eager prompt."""
    from transformers import DynamicCache, StaticCache

    generator = torch.Generator().manual_seed(1)
    prompt, tokens = (torch.randint(64, (1, count), generator=generator) for count in (70, steps))
    cache = StaticCache(config=model.config, max_cache_len=96) if kind == "static" else DynamicCache(config=model.config)
    model(prompt, past_key_values=cache)
    return torch.cat([compiled(tokens[:, i : i + 1], past_key_values=cache).logits for i in range(steps)])


def compiled(model: Any, share: bool, guarantee: str = "expected") -> Any:
    options = {"min_context": 0, "tolerance": 8.0, "guarantee": guarantee, "share_layers": share, "stats": True, "strict": True}
    return torch.compile(model, backend="alignedkv", options=options)


def test_a_model_decodes_with_a_few_regions(deep_llama: Any, regions: list[Any]) -> None:
    logits = decode(deep_llama, "static", compiled(deep_llama, share=True))
    torch.testing.assert_close(logits, decode(deep_llama, "static", deep_llama), rtol=1e-2, atol=1e-2)
    assert len(regions) == 3, "before the layers, some of these, and after them"
    layers = alignedkv_compile.stats().layers
    assert [layer.calls for layer in layers] == [5] * LAYERS
    assert len({layer.rows for layer in layers}) == 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["static", "dynamic"])
@pytest.mark.parametrize("guarantee", ["expected", "worst_case"])
def test_a_model_decodes_as_from_one_graph(deep_llama: Any, regions: list[Any], kind: str, guarantee: str) -> None:
    results, layers = {}, {}
    for share in (True, False):
        torch._dynamo.reset()
        gc.collect()  # graphs of the other choice count no longer
        alignedkv_compile.reset_stats()  # those that something else still holds count from zero
        results[share] = decode(deep_llama, kind, compiled(deep_llama, share, guarantee))
        layers[share] = alignedkv_compile.stats().layers
        assert bool(regions) == share
        regions.clear()
    torch.testing.assert_close(results[True], results[False], rtol=1e-4, atol=1e-4)
    for left, right in zip(layers[True], layers[False], strict=True):
        assert (left.calls, left.bytes_full) == (right.calls, right.bytes_full)
        assert left.bytes_read == pytest.approx(right.bytes_read, rel=0.05), "rounding may tip a choice"
        assert left.certificates == pytest.approx(right.certificates, rel=0.05)


def test_weights_as_constants_need_one_graph(deep_llama: Any, regions: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    whole: list[object] = []
    monkeypatch.setattr(torch_private, "compile_graph", lambda module, *_: whole.append(module) or module)
    options = {"inductor": {"freezing": True}, "min_context": 10**6}
    decode(deep_llama, "static", torch.compile(deep_llama, backend="alignedkv", options=options), steps=1)
    assert whole
    assert not regions


def test_what_is_assumed_of_one_layer_is_guarded_for_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    mode = FakeTensorMode(shape_env=ShapeEnv())
    size, other = (torch_private.fresh_size(mode, 24, name) for name in ("one", "other"))
    with mode:
        example = torch.empty(size)
    graph = torch.fx.Graph()
    graph.output((graph.placeholder("x"),))

    def assuming(*_: object) -> Any:
        assert size % 8 == 0
        return lambda x: (x,)

    monkeypatch.setattr(torch_private, "compile_graph", assuming)
    symbols = {size.node.expr: other.node.expr}
    torch_private.compile_region(torch.fx.GraphModule({}, graph), [example], [symbols], {})
    guards = [guard.expr for guard in mode.shape_env.guards]
    assert any(guard.free_symbols == {size.node.expr} for guard in guards)
    assert any(guard.free_symbols == {other.node.expr} for guard in guards)
