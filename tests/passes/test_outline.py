"""Cutting graphs at their layers' borders: which parts are one region, and what keeps a graph whole."""

# ruff: noqa: ANN001 - the modules that Dynamo traces read better bare

from __future__ import annotations

import copy
import operator
import sys
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from alignedkv_compile.contract import RewrittenGraph
from alignedkv_compile.options import Options
from alignedkv_compile.outlined import Outline, OutlinedGraph
from alignedkv_compile.passes import outline_layers

HEADS, DIM, ROWS = 2, 16, 32


class Layer(nn.Module):
    def __init__(self, activation: str = "silu") -> None:
        super().__init__()
        self.project = nn.ModuleList(nn.Linear(HEADS * DIM, HEADS * DIM) for _ in range(3))
        self.out = nn.Linear(HEADS * DIM, HEADS * DIM)
        self.activation = activation

    def forward(self, hidden, cache, positions):
        query, key, value = (each(hidden).view(1, -1, HEADS, DIM).transpose(1, 2) for each in self.project)
        keys, values = self.write(key, value, cache, positions)
        read = F.scaled_dot_product_attention(query, keys, values).transpose(1, 2).reshape(1, -1, HEADS * DIM)
        return hidden + getattr(F, self.activation)(self.out(read)), (keys, values)

    def write(self, key, value, cache, positions):
        return cache[0].index_copy_(2, positions, key), cache[1].index_copy_(2, positions, value)


class GrowingLayer(Layer):
    def write(self, key, value, cache, positions):
        return torch.cat([cache[0], key], 2), torch.cat([cache[1], value], 2)


class Model(nn.Module):
    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(HEADS * DIM)

    def forward(self, hidden, caches, positions):
        hidden, written = hidden * 2, []
        for layer, cache in zip(self.layers, caches, strict=True):
            hidden, cache = layer(hidden, cache, positions)
            written.append(cache)
        return self.norm(hidden), written if isinstance(self.layers[0], GrowingLayer) else None


def caches(layers: int, rows: int = ROWS) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.randn(1, HEADS, rows, DIM), torch.randn(1, HEADS, rows, DIM)) for _ in range(layers)]


def rewritten(model: Model, make_harness, options: Options | None = None) -> RewrittenGraph:
    """What the passes make of one decode step; run once, so that the harness has checked its bindings."""
    harness = make_harness(options or Options(min_context=0))
    arguments = torch.randn(1, 1, HEADS * DIM), caches(len(model.layers)), torch.tensor([5])
    torch.compile(model, backend=harness, fullgraph=True)(*arguments)
    return harness.last


def eagerly(outline: Outline) -> OutlinedGraph:
    return OutlinedGraph(outline, lambda module, *_: module)


def real(examples: Sequence[object]) -> list[torch.Tensor]:
    """Tensors for a graph of static shapes, stale planes among them."""
    return [
        torch.randn(example.shape) if example.is_floating_point() else torch.zeros(example.shape, dtype=example.dtype)
        for example in examples
        if isinstance(example, torch.Tensor)
    ]


@pytest.fixture
def free_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Regions cost nothing, so that few layers are cut, too."""
    module = sys.modules[outline_layers.__module__]
    monkeypatch.setattr(module, "CALL_COST", 0)
    monkeypatch.setattr(module, "REGION_COST", 0)


def test_each_of_many_layers_is_a_call_of_one_region(make_harness) -> None:
    graph = rewritten(Model([Layer() for _ in range(24)]), make_harness)
    outline = outline_layers(graph)
    assert outline is not None
    assert [call.region for call in outline.calls] == [0, *[1] * 24, 2]
    assert sum(len(region.module.graph.nodes) for region in outline.regions) < len(graph.module.graph.nodes) / 2


@pytest.mark.usefixtures("free_calls")
def test_like_layers_are_one_region(make_harness) -> None:
    outline = outline_layers(rewritten(Model([Layer() for _ in range(6)]), make_harness))
    assert outline is not None
    assert [call.region for call in outline.calls] == [0, *[1] * 6, 2]


@pytest.mark.usefixtures("free_calls")
def test_the_calls_compute_what_the_graph_does(make_harness) -> None:
    graph = rewritten(Model([Layer() for _ in range(6)]), make_harness)
    outline = outline_layers(graph)
    assert outline is not None
    inputs = real(graph.example_inputs)
    twins = copy.deepcopy(inputs)
    for left, right in zip(eagerly(outline)(*inputs), graph.module(*twins), strict=True):
        assert torch.equal(left, right)
    for left, right in zip(inputs, twins, strict=True):
        assert torch.equal(left, right)


@pytest.mark.usefixtures("free_calls")
def test_values_are_dropped_when_nothing_reads_them_any_more(make_harness) -> None:
    outline = outline_layers(rewritten(Model([Layer() for _ in range(6)]), make_harness))
    assert outline is not None
    freed = [slot for call in outline.calls for slot in call.freed]
    assert len(freed) == len(set(freed))
    made = [slot for call in outline.calls for slot in call.outputs]
    assert set(made) == {*freed, *outline.outputs}


@pytest.mark.usefixtures("free_calls")
def test_a_layer_that_differs_is_a_region_of_its_own(make_harness) -> None:
    layers = [Layer("relu" if number == 3 else "silu") for number in range(7)]
    outline = outline_layers(rewritten(Model(layers), make_harness))
    assert outline is not None
    assert len(outline.regions) < len(outline.calls)
    activations = [
        [node.target for node in region.module.graph.nodes if node.target in (F.silu, F.relu, torch.relu)]
        for region in outline.regions
    ]
    in_order = [activations[call.region] for call in outline.calls]
    assert [target is F.silu for targets in in_order for target in targets] == [number != 3 for number in range(7)]


@pytest.mark.usefixtures("free_calls")
def test_numbers_of_another_type_are_other_numbers(make_harness) -> None:
    class Scaled(Layer):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.factor = factor

        def forward(self, hidden, cache, positions):
            return super().forward(hidden * self.factor, cache, positions)

    model = Model([Scaled(2) for _ in range(6)] + [Scaled(2.0) for _ in range(6)])
    outline = outline_layers(rewritten(model, make_harness))
    assert outline is not None
    assert len(outline.regions) == 4


@pytest.mark.usefixtures("free_calls")
def test_contiguous_results_are_contiguous_whatever_makes_them(make_harness) -> None:
    outline = outline_layers(rewritten(Model([Layer() for _ in range(6)]), make_harness))
    assert outline is not None
    for region in outline.regions:
        results = region.module.graph.output_node().all_input_nodes
        assert [node.target for node in results] == ["contiguous"] * len(results)
        assert all(node.meta["example_value"].is_contiguous() for node in results)


def test_few_layers_stay_whole(make_harness) -> None:
    graph = rewritten(Model([Layer() for _ in range(2)]), make_harness)
    assert outline_layers(graph) is None
    cut = outline_layers(graph, always=True)
    assert cut is not None
    assert len(cut.calls) > 1


@pytest.mark.usefixtures("free_calls")
def test_each_layer_records_in_its_own_row(make_harness) -> None:
    graph = rewritten(Model([Layer() for _ in range(6)]), make_harness, Options(min_context=0, stats=True))
    outline = outline_layers(graph)
    assert outline is not None
    assert graph.statistics.counters_input is not None
    counters = [rows for rows in outline.rows if rows.tensor == graph.statistics.counters_input]
    assert sum(rows.count for rows in counters) == 6
    assert [rows.first for rows in counters] == [sum(rows.count for rows in counters[:i]) for i in range(len(counters))]
    inputs = real(graph.example_inputs)
    inputs[graph.statistics.counters_input].zero_()
    twins = copy.deepcopy(inputs)
    eagerly(outline)(*inputs)
    graph.module(*twins)
    recorded = inputs[graph.statistics.counters_input]
    assert torch.equal(recorded, twins[graph.statistics.counters_input])
    assert recorded[:, 0].tolist() == [1] * 6


@pytest.mark.usefixtures("free_calls")
def test_each_layer_has_symbols_of_its_own(make_harness) -> None:
    model = Model([GrowingLayer() for _ in range(4)])
    harness = make_harness(Options(min_context=0))
    compiled = torch.compile(model, backend=harness, fullgraph=True, dynamic=True)
    growing = caches(4)
    for cache in growing:
        for tensor in cache:
            torch._dynamo.mark_dynamic(tensor, 2)
    compiled(torch.randn(1, 1, HEADS * DIM), growing, torch.tensor([5]))
    outline = outline_layers(harness.last)
    assert outline is not None
    others = [names for region in outline.regions for names in region.others]
    assert others
    assert any(symbol != other for names in others for symbol, other in names.items())
    for names in others:
        assert len(set(names.values())) == len(names)


@pytest.mark.usefixtures("free_calls")
def test_gradients_keep_a_graph_whole(make_harness) -> None:
    graph = rewritten(Model([Layer() for _ in range(6)]), make_harness)
    with torch.enable_grad():
        assert outline_layers(graph) is None
    assert outline_layers(graph) is not None


@pytest.mark.usefixtures("free_calls")
def test_arguments_that_share_written_memory_keep_a_graph_whole(make_harness) -> None:
    class Reread(Layer):
        def forward(self, hidden, cache, positions):
            hidden, written = super().forward(hidden, cache[:2], positions)
            return hidden + cache[2].mean(), written

    class Aliasing(Model):
        def forward(self, hidden, caches, positions):
            return super().forward(hidden, [(key, value, key[:, :, 1:]) for key, value in caches], positions)

    model = Aliasing([Reread() for _ in range(6)])
    assert outline_layers(rewritten(model, make_harness)) is None


@pytest.mark.usefixtures("free_calls")
@pytest.mark.parametrize(("arguments", "cut"), [((False,), True), ((True,), False)])
def test_a_change_of_mode_keeps_a_graph_whole(make_harness, arguments: tuple[bool], cut: bool) -> None:
    graph = rewritten(Model([Layer() for _ in range(6)]), make_harness)
    first = next(node for node in graph.module.graph.nodes if node.op == "call_function")
    with graph.module.graph.inserting_before(first):
        graph.module.graph.call_function(torch._C._set_grad_enabled, arguments)
    assert (outline_layers(graph) is not None) == cut


@pytest.mark.usefixtures("free_calls")
def test_an_output_that_is_no_tensor_keeps_a_graph_whole(make_harness) -> None:
    graph = rewritten(Model([Layer() for _ in range(6)]), make_harness)
    output = graph.module.graph.output_node()
    output.args = ((*output.args[0], None),)
    assert outline_layers(graph) is None


@pytest.mark.usefixtures("free_calls")
def test_a_value_that_only_python_knows_keeps_a_graph_whole(make_harness) -> None:
    graph = rewritten(Model([Layer() for _ in range(6)]), make_harness)
    layer = next(node for node in graph.module.graph.nodes if node.target == F.silu)
    with graph.module.graph.inserting_before(layer):
        unknown = graph.module.graph.call_function(operator.not_, (layer.args[0],))
    user = next(iter(graph.module.graph.output_node().all_input_nodes))
    user.kwargs = {**user.kwargs, "unknown": unknown}
    assert outline_layers(graph) is None
