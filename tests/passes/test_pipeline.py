"""The frame around the finders: copying, verifying, logging, and compiling the result with Inductor."""

# ruff: noqa: ANN001 - fixtures and the functions that Dynamo traces read better bare

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F

from alignedkv_compile.errors import GraphVerificationError
from alignedkv_compile.options import Options
from alignedkv_compile.passes.editor import GraphEditor
from alignedkv_compile.passes.graph_copy import copy_graph
from alignedkv_compile.passes.verify import verify_rewrite

DIM = 16


def static_layer(query, key, value, key_cache, value_cache, positions):
    key_cache.index_copy_(2, positions, key)
    value_cache.index_copy_(2, positions, value)
    return F.scaled_dot_product_attention(query * 2, key_cache, value_cache, enable_gqa=True) + 1


def dynamic_layer(query, key, value, past_key, past_value):
    keys, values = torch.cat([past_key, key], 2), torch.cat([past_value, value], 2)
    return F.scaled_dot_product_attention(query * 2, keys, values, enable_gqa=True) + 1, keys, values


def inputs(rows: int = 1) -> list[torch.Tensor]:
    return [torch.randn(1, 4, rows, DIM), *(torch.randn(1, 2, count, DIM) for count in (rows, rows, 32, 32))]


def test_the_copy_carries_what_dynamo_and_aotautograd_look_up(harness) -> None:
    torch.compile(static_layer, backend=harness, fullgraph=True)(*inputs(), torch.tensor([3]))
    original, copied = harness.originals[0], copy_graph(harness.originals[0])
    assert copied.graph is not original.graph
    for left, right in zip(original.graph.nodes, copied.graph.nodes, strict=True):
        assert left is not right
        assert left.meta == right.meta
        assert getattr(left, "_dynamo_source", None) is getattr(right, "_dynamo_source", None)
    assert copied._param_name_to_source is original._param_name_to_source
    assert not hasattr(copied, "_backend_id"), (
        "under it a later process would call the rewritten graph as if it were the original"
    )


def test_decisions_are_logged(harness, caplog) -> None:
    with caplog.at_level(logging.DEBUG, logger="alignedkv_compile.passes"):
        torch.compile(static_layer, backend=harness, fullgraph=True)(*inputs(), torch.tensor([3]))
    assert any("rewritten" in record.getMessage() for record in caplog.records if record.name == "alignedkv_compile.passes")


def drop_a_write(graph: torch.fx.Graph) -> None:
    graph.erase_node(next(node for node in graph.nodes if node.target == "index_copy_"))


def change_an_argument(graph: torch.fx.Graph) -> None:
    node = next(node for node in graph.nodes if node.name.startswith("mul"))
    node.args = (node.args[0], 3)


def drop_the_planes_write(graph: torch.fx.Graph) -> None:
    graph.erase_node(next(node for node in graph.nodes if "quantize_on_write" in str(node.target)))


def write_planes_late(graph: torch.fx.Graph) -> None:
    node = next(node for node in graph.nodes if "quantize_on_write" in str(node.target))
    next(node for node in graph.nodes if "aligned_read" in str(node.target)).append(node)


def forget_an_argument(graph: torch.fx.Graph) -> None:
    node = next(node for node in graph.nodes if "aligned_read" in str(node.target))
    node.kwargs = {name: value for name, value in node.kwargs.items() if name != "scale"}


@pytest.mark.parametrize(
    "sabotage", [drop_a_write, change_an_argument, drop_the_planes_write, write_planes_late, forget_an_argument]
)
def test_verification_catches_a_defect(harness, monkeypatch, sabotage) -> None:
    def sabotaged(module, before, pairing, editor: GraphEditor, options: Options) -> None:
        sabotage(module.graph)
        editor.added = [node for node in editor.added if node in set(module.graph.nodes)]
        verify_rewrite(module, before, pairing, editor, options)

    monkeypatch.setattr("alignedkv_compile.passes.verify_rewrite", sabotaged)
    with pytest.raises(Exception, match=r".") as caught:
        torch.compile(static_layer, backend=harness, fullgraph=True)(*inputs(), torch.tensor([3]))
    assert isinstance(caught.value.inner_exception, GraphVerificationError)


def test_a_graph_without_attention_passes_through(harness) -> None:
    x = torch.randn(3)
    assert torch.equal(torch.compile(lambda x: x + 1, backend=harness)(x), x + 1)
    assert harness.last.kept_outputs == (0,)


@pytest.mark.parametrize("dynamic", [None, True])
def test_inductor_compiles_a_static_rewrite(make_harness, same_as_stock, dynamic) -> None:
    harness = make_harness(Options(stats=True), inductor=True)
    same_as_stock(static_layer, harness, *inputs(3), torch.tensor([3, 4, 5]), dynamic=dynamic)


def test_inductor_compiles_an_append_for_all_lengths_and_capacities(make_harness) -> None:
    harness = make_harness(Options(stats=True), inductor=True)
    compiled = torch.compile(dynamic_layer, backend=harness, fullgraph=True)
    query, key, value, past_key, past_value = inputs()
    stock = past_key, past_value
    for _ in range(4):
        out, past_key, past_value = compiled(query, key, value, past_key.contiguous(), past_value.contiguous())
        expected, *stock = dynamic_layer(query, key, value, *stock)
        torch.testing.assert_close(out, expected)
        assert torch.equal(past_key, stock[0])
    assert len(harness.graphs) == 2
