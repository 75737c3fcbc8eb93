"""Rewriting all pairs of a graph, and numbering the inputs and outputs that result."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from alignedkv_compile.contract import RewrittenGraph, SiteReport, StatisticsBinding
from alignedkv_compile.ops import COUNTER_FIELDS
from alignedkv_compile.torch_private import defining_size, detect_fake_mode

from .caches.kind import Positions, RewrittenPair
from .editor import GraphEditor
from .nodes import fake
from .records import Pairing
from .replace_attention import StatisticsInputs
from .shadow_outputs import return_reads, shadow_reads
from .worth import AlignmentOptions, options_for, query_heads


@dataclass(frozen=True)
class Rewriting:
    """The edited graph with the nodes that the runtime will bind; original inputs and outputs are kept by node.

    Attributes:
        inputs, outputs: of Dynamo's graph, in its order. Some of the nodes are no longer in the graph.
        query_heads: for each line of the report, the heads of the read that stands there now, or 0.
        shadowed: what the graph returns for shadow checks, behind its own outputs.
    """

    editor: GraphEditor
    inputs: tuple[Node, ...]
    outputs: tuple[object, ...]
    pairs: tuple[RewrittenPair, ...]
    statistics: StatisticsInputs
    query_heads: tuple[int, ...]
    shadowed: tuple[Node, ...]

    def result(self, module: GraphModule, example_inputs: Sequence[object], report: tuple[SiteReport, ...]) -> RewrittenGraph:
        """Positions instead of nodes: what leaves the passes."""
        now = tuple(node for node in module.graph.nodes if node.op == "placeholder")
        kept = tuple(position for position, node in enumerate(self.inputs) if node in set(now))
        dropped = {node for pair in self.pairs for node in pair.dropped_outputs}
        positions = Positions(self.inputs, self.outputs, now)
        return RewrittenGraph(
            module=module,
            example_inputs=(
                *(_defining(node, example_inputs[position]) for node, position in zip(now, kept, strict=False)),
                *_example_inputs(now[len(kept) :], example_inputs),
            ),
            kept_inputs=kept,
            kept_outputs=tuple(position for position, value in enumerate(self.outputs) if value not in dropped),
            outputs=len(self.outputs),
            caches=tuple(pair.binding(positions) for pair in self.pairs),
            statistics=StatisticsBinding(
                counters_input=None if self.statistics.counters is None else now.index(self.statistics.counters),
                bounds_input=None if self.statistics.bounds is None else now.index(self.statistics.bounds),
                query_heads=self.query_heads,
            ),
            sites=report,
            shadow=shadow_reads(self.editor, now, self.shadowed) if self.shadowed else (),
        )


def rewrite_pairs(module: GraphModule, pairing: Pairing, options: AlignmentOptions, *, sites: int) -> Rewriting:
    """Edit the graph of ``module`` in place.

    Args:
        sites: lines of the report, which are the rows of the tensors that reads record in.
    """
    inputs = tuple(node for node in module.graph.nodes if node.op == "placeholder")
    outputs = tuple(module.graph.output_node().args[0])  # type: ignore[arg-type]
    editor = GraphEditor(module)
    heads = _query_heads(pairing, sites)
    statistics = _statistics_inputs(editor, pairing, heads, options)
    rewritten = [
        pair.rewrite(number, editor, options_for(pair.sites[0], options), statistics)
        for number, pair in enumerate(pairing.pairs)
    ]
    pairs = tuple(pair for pair in rewritten if pair is not None)
    shadowed = return_reads(editor) if options.shadow_every else ()
    return Rewriting(editor, inputs, outputs, pairs, statistics, heads, shadowed)


def _query_heads(pairing: Pairing, sites: int) -> tuple[int, ...]:
    heads = {site.index: query_heads(site) for site in pairing.rewritten}
    return tuple(heads.get(index, 0) for index in range(sites))


def _statistics_inputs(
    editor: GraphEditor, pairing: Pairing, query_heads: tuple[int, ...], options: AlignmentOptions
) -> StatisticsInputs:
    """Placeholders of what the reads record in, one row for each line of the report."""
    if not pairing.rewritten:
        return StatisticsInputs()
    device, sites = fake(pairing.rewritten[0].key.source).device, len(query_heads)
    counted, certified = (sites, len(COUNTER_FIELDS)), (sites, 2, max(query_heads))
    return StatisticsInputs(
        counters=editor.placeholder("alignedkv_counters", counted, torch.int64, device) if options.stats else None,
        bounds=editor.placeholder("alignedkv_bounds", certified, torch.float32, device) if options.certified else None,
    )


def _defining(node: Node, example: object) -> object:
    """The example value of an input that stays; of a size, one that defines the symbol in which the graph writes its sizes."""
    if isinstance(example, torch.SymInt):
        example = node.meta["example_value"] = defining_size(example)
    return example


def _example_inputs(added: Sequence[Node], example_inputs: Sequence[object]) -> list[torch.Tensor]:
    """Fakes for the new inputs, in the mode that Dynamo compiles under."""
    mode = detect_fake_mode(list(example_inputs)) or contextlib.nullcontext()
    with mode:
        fakes = [fake(node) for node in added]
        return [torch.empty(tuple(one.shape), dtype=one.dtype, device=one.device) for one in fakes]
