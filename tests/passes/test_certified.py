"""``guarantee="worst_case"``: certified reads in place of aligned ones, and the devices that have none."""

# ruff: noqa: ANN001 - fixtures and the functions that Dynamo traces read better bare

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from alignedkv_compile import ops, torch_private
from alignedkv_compile.contract import Outcome
from alignedkv_compile.errors import GraphVerificationError
from alignedkv_compile.options import Options
from alignedkv_compile.passes import rewrite_graph
from alignedkv_compile.passes.editor import GraphEditor
from alignedkv_compile.passes.verify import verify_rewrite
from alignedkv_compile.torch_private import FakeTensorMode, inductor_config

DIM = 16


def static_layer(query, key, value, key_cache, value_cache, positions):
    key_cache.index_copy_(2, positions, key)
    value_cache.index_copy_(2, positions, value)
    return F.scaled_dot_product_attention(query * 2, key_cache, value_cache, enable_gqa=True) + 1


def dynamic_layer(query, key, value, past_key, past_value):
    keys, values = torch.cat([past_key, key], 2), torch.cat([past_value, value], 2)
    return F.scaled_dot_product_attention(query * 2, keys, values, enable_gqa=True) + 1, keys, values


def inputs(kind: str, heads: int = 4, rows: int = 1, device: str = "cpu") -> list[torch.Tensor]:
    shapes = [(1, heads, rows, DIM), *((1, 2, count, DIM) for count in (rows, rows, 32, 32))]
    positions = [torch.arange(3, 3 + rows, device=device)] if kind == "static" else []
    return [*(torch.randn(shape, device=device) for shape in shapes), *positions]


LAYERS = {"static": static_layer, "dynamic": dynamic_layer}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("stats", [False, True])
def test_attention_becomes_a_certified_read(make_harness, same_as_stock, operations, kind: str, stats: bool) -> None:
    harness = make_harness(Options(guarantee="worst_case", min_context=0, stats=stats))
    same_as_stock(LAYERS[kind], harness, *inputs(kind))
    assert harness.outcomes == [Outcome.REWRITTEN]
    found = operations(harness.last.module)
    assert found["certified_read_attention." + ("counted" if stats else "default")] == 1
    assert found["quantize_on_write.default"] == 1
    assert found["scaled_dot_product_attention"] == 0
    assert not any(name.startswith("aligned_read_attention") for name in found)
    assert harness.last.statistics.query_heads == (4,)
    assert harness.bounds.shape == (1, 2, 4)
    assert (harness.counters is not None) == stats


@pytest.mark.parametrize("kind", LAYERS)
def test_expected_graphs_have_no_bounds(make_harness, operations, kind: str) -> None:
    harness = make_harness(Options(min_context=0, stats=True))
    torch.compile(LAYERS[kind], backend=harness, fullgraph=True)(*inputs(kind))
    assert harness.last.statistics.bounds_input is None
    found = operations(harness.last.module)
    assert found["aligned_read_attention.counted"] == 1
    assert not any(name.startswith("certified_read_attention") for name in found)


def test_layers_with_different_heads_share_one_tensor(make_harness, same_as_stock) -> None:
    def layers(many, few, declined):
        masked = F.scaled_dot_product_attention(declined[0], declined[3], declined[4], is_causal=True, enable_gqa=True)
        return static_layer(*few), masked, static_layer(*many)

    harness = make_harness(Options(guarantee="worst_case", min_context=0))
    same_as_stock(layers, harness, inputs("static", heads=6), inputs("static", heads=2), inputs("static"))
    assert harness.outcomes == [Outcome.DECLINED, Outcome.REWRITTEN, Outcome.REWRITTEN]
    assert harness.last.statistics.query_heads == (0, 2, 6)
    assert harness.bounds.shape == (3, 2, 6)


def test_a_prefill_records_nothing(make_harness, same_as_stock) -> None:
    harness = make_harness(Options(guarantee="worst_case", stats=True))
    same_as_stock(static_layer, harness, *inputs("static", rows=20))
    assert harness.outcomes == [Outcome.PREFILL]
    assert harness.bounds is harness.counters is None
    assert harness.last.statistics.query_heads == (0,)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("rows", [1, 20], ids=["decode", "prefill"])
@pytest.mark.parametrize("guarantee", ["expected", "worst_case"])
def test_caches_on_gpus_are_declined(operations, kind: str, rows: int, guarantee: str) -> None:
    """Seen through fake tensors, which need no GPU."""
    found = []

    def backend(gm, example_inputs):
        found.append((gm, rewrite_graph(gm, example_inputs, options=Options(guarantee=guarantee))))
        return gm.forward

    with FakeTensorMode():
        torch.compile(LAYERS[kind], backend=backend, fullgraph=True)(*inputs(kind, rows=rows, device="cuda:0"))
    ((original, rewritten),) = found
    (site,) = rewritten.sites
    if guarantee == "expected":
        assert site.outcome is (Outcome.REWRITTEN if rows == 1 else Outcome.PREFILL)
    else:
        assert site.outcome is Outcome.DECLINED
        assert site.reason == "guarantee='worst_case' has generated C++ only; this cache is on cuda:0"
        assert operations(rewritten.module) == operations(original)
        assert rewritten.caches == ()


def test_whatever_triton_is_generated_for_is_declined(make_harness, same_as_stock) -> None:
    harness = make_harness(Options(guarantee="worst_case"))
    with inductor_config.patch(cpu_backend="triton"):
        assert torch_private.generates_triton(torch.device("cpu"))
        same_as_stock(static_layer, harness, *inputs("static"))
    assert "has generated C++ only" in harness.reasons[0]


def test_verification_catches_a_read_without_its_certificate(make_harness, monkeypatch) -> None:
    def sabotaged(module, before, pairing, editor: GraphEditor, options: Options) -> None:
        node = next(node for node in module.graph.nodes if node.target is ops.certified_read_attention.default)
        node.target = ops.aligned_read_attention.default
        node.kwargs = {name: value for name, value in node.kwargs.items() if name not in ("bounds", "site")}
        verify_rewrite(module, before, pairing, editor, options)

    monkeypatch.setattr("alignedkv_compile.passes.verify_rewrite", sabotaged)
    with pytest.raises(Exception, match="1 nodes of alignedkv::aligned_read_attention where 0 belong") as caught:
        torch.compile(static_layer, backend=make_harness(Options(guarantee="worst_case")), fullgraph=True)(*inputs("static"))
    assert isinstance(caught.value.inner_exception, GraphVerificationError)
