"""Rewriting all pairs of a graph, and numbering the inputs and outputs that result."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from alignedkv_compile.ops import COUNTER_FIELDS
from alignedkv_compile.torch_private import detect_fake_mode

from .append import AppendInputs, largest_capacity, rewrite_append
from .editor import GraphEditor
from .nodes import fake
from .records import AppendBinding, AppendPair, Pairing, RewrittenGraph, SiteReport, StaticBinding, StaticPair
from .replace_attention import AlignmentOptions
from .rewrite_static import rewrite_static


@dataclass(frozen=True)
class Rewriting:
    """The edited graph with the nodes that the runtime will bind; original inputs and outputs are kept by node.

    Attributes:
        inputs, outputs: of Dynamo's graph, in its order. Some of the nodes are no longer in the graph.
    """

    editor: GraphEditor
    inputs: tuple[Node, ...]
    outputs: tuple[object, ...]
    static: tuple[tuple[StaticPair, Node], ...]
    append: tuple[tuple[AppendPair, AppendInputs], ...]
    counters: Node | None

    def result(self, module: GraphModule, example_inputs: Sequence[object], report: tuple[SiteReport, ...]) -> RewrittenGraph:
        """Positions instead of nodes: what leaves the passes."""
        now = [node for node in module.graph.nodes if node.op == "placeholder"]
        kept = tuple(position for position, node in enumerate(self.inputs) if node in set(now))
        dropped = {node for pair, _ in self.append for node in (pair.key_result, pair.value_result)}
        return RewrittenGraph(
            module=module,
            example_inputs=(
                *(example_inputs[position] for position in kept),
                *_example_inputs(now[len(kept) :], example_inputs),
            ),
            kept_inputs=kept,
            kept_outputs=tuple(position for position, value in enumerate(self.outputs) if value not in dropped),
            outputs=len(self.outputs),
            static=tuple(
                StaticBinding(self.inputs.index(pair.key), self.inputs.index(pair.value), now.index(planes))
                for pair, planes in self.static
            ),
            append=tuple(self._append_binding(pair, inputs, now) for pair, inputs in self.append),
            counters_input=None if self.counters is None else now.index(self.counters),
            sites=report,
        )

    def _append_binding(self, pair: AppendPair, inputs: AppendInputs, now: list[Node]) -> AppendBinding:
        return AppendBinding(
            key_input=self.inputs.index(pair.key),
            value_input=self.inputs.index(pair.value),
            key_buffer_input=now.index(inputs.key_buffer),
            value_buffer_input=now.index(inputs.value_buffer),
            planes_input=None if inputs.planes is None else now.index(inputs.planes),
            key_outputs=tuple(position for position, value in enumerate(self.outputs) if value is pair.key_result),
            value_outputs=tuple(position for position, value in enumerate(self.outputs) if value is pair.value_result),
            new_rows=pair.new_rows,
            largest_capacity=largest_capacity(fake(pair.key), fake(pair.value)),
        )


def rewrite_pairs(module: GraphModule, pairing: Pairing, options: AlignmentOptions, *, sites: int) -> Rewriting:
    """Edit the graph of ``module`` in place.

    Args:
        sites: lines of the report, which are the rows of the counters tensor.
    """
    inputs = tuple(node for node in module.graph.nodes if node.op == "placeholder")
    outputs = tuple(module.graph.output_node().args[0])  # type: ignore[arg-type]
    editor = GraphEditor(module)
    counters = _counters(editor, sites, pairing) if options.stats and pairing.rewritten else None
    static, append = [], []
    for number, pair in enumerate(pairing.static):
        planes = rewrite_static(pair, number, editor, options, counters)
        if planes is not None:
            static.append((pair, planes))
    for number, append_pair in enumerate(pairing.append):
        append.append((append_pair, rewrite_append(append_pair, number, editor, options, counters)))
    return Rewriting(editor, inputs, outputs, tuple(static), tuple(append), counters)


def _counters(editor: GraphEditor, sites: int, pairing: Pairing) -> Node:
    pairs: list[StaticPair | AppendPair] = [*pairing.static, *pairing.append]
    return editor.placeholder("alignedkv_counters", (sites, len(COUNTER_FIELDS)), torch.int64, fake(pairs[0].key).device)


def _example_inputs(added: list[Node], example_inputs: Sequence[object]) -> list[torch.Tensor]:
    """Fakes for the new inputs, in the mode that Dynamo compiles under."""
    mode = detect_fake_mode(list(example_inputs)) or contextlib.nullcontext()
    with mode:
        fakes = [fake(node) for node in added]
        return [torch.empty(tuple(one.shape), dtype=one.dtype, device=one.device) for one in fakes]
