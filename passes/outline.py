"""Cutting a rewritten graph at the borders of its layers, so that layers that compute the same are compiled once.

A layer is a module that stands in a list of modules (``model.layers[3]``); what Dynamo traced in it is one run of nodes, and
a region of its own.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby

import torch
from torch.fx import Graph, GraphModule, Node

from alignedkv_compile.contract import RewrittenGraph
from alignedkv_compile.outlined import Outline, RegionCall, Rows

from .nodes import operation
from .region import Inputs, Names, Operand, Piece, WholeGraphError, piece_of, region_of, signature

_log = logging.getLogger(__name__)

REGION_COST = 30
"""Compiling a region takes as long as so many nodes of it, whatever it has."""

CALL_COST = 20
"""A call of a region for each of some hundred thousand tokens takes as long as compiling so many nodes."""

_LAYER = re.compile(r"[.\[]\d+\]?$")
_CHANGES_A_MODE = ("set_grad", "nesting", "hooks", "deterministic", "set_default")
"""In names of functions that change a mode. Those that return what changes it back are not here: that stays in one region."""


@dataclass(frozen=True)
class _Cut:
    """Pieces of a graph in order, and for each of them the number of its region and the names of its symbols."""

    pieces: tuple[Piece, ...]
    regions: tuple[int, ...]
    names: tuple[Names, ...]

    @classmethod
    def of(cls, graph: Graph) -> _Cut:
        inputs = Inputs.of(graph)
        pieces = tuple(piece_of(nodes, inputs) for nodes in _runs(graph))
        names = tuple(Names() for _ in pieces)
        numbers: dict[Hashable, int] = {}
        regions = tuple(
            numbers.setdefault(signature(piece, own), len(numbers)) for piece, own in zip(pieces, names, strict=True)
        )
        return cls(pieces, regions, names)

    @property
    def cost(self) -> int:
        """What compiling and calling takes, in nodes."""
        compiled = dict(zip(self.regions, self.pieces, strict=True)).values()
        return sum(len(piece.nodes) + REGION_COST for piece in compiled) + CALL_COST * len(self.pieces)

    def members(self) -> Iterator[list[int]]:
        """For each region the places of its pieces."""
        for number in range(max(self.regions, default=-1) + 1):
            yield [place for place, region in enumerate(self.regions) if region == number]


def outline_layers(rewritten: RewrittenGraph, *, always: bool = False) -> Outline | None:
    """The graph as calls of regions, or None where it stays whole: too little repeats, or a cut might change what it computes.

    Two layers may have different symbols for the same length, as Dynamo makes one for each tensor: a region lists those of the
    layers that it serves beside its own.

    Args:
        rewritten: for inference; its module is not changed.
        always: cut where it can be done, also where compiling the whole graph takes less.
    """
    example_inputs = rewritten.example_inputs
    try:
        if torch.is_grad_enabled() and any(isinstance(value, torch.Tensor) and value.requires_grad for value in example_inputs):
            raise WholeGraphError("gradients are wanted")
        if any(isinstance(value, torch.Tensor) and value.device.type != "cpu" for value in example_inputs):
            raise WholeGraphError("not on a CPU")
        return _outline(rewritten.module, always=always)
    except WholeGraphError as reason:
        _log.debug("one graph for all layers: %s", reason)
        return None


def _outline(module: GraphModule, *, always: bool) -> Outline:
    graph = module.graph
    cut = _Cut.of(graph)
    repeats = any(others for _, *others in cut.members())
    if not always and (not repeats or cut.cost >= len(graph.nodes) + REGION_COST + CALL_COST):
        raise WholeGraphError("too little repeats")

    outputs = graph.output_node().args[0]
    returned = [value for value in outputs if isinstance(value, Node)] if isinstance(outputs, tuple | list) else []
    if not isinstance(outputs, tuple | list) or len(returned) < len(outputs):
        raise WholeGraphError("an output is no node")
    placeholders = graph.find_nodes(op="placeholder")
    slots = {Operand(node): slot for slot, node in enumerate(placeholders)}
    rows = []
    for operand in dict.fromkeys(operand for piece in cut.pieces for operand in piece.operands):
        if operand.rows is not None:
            rows.append(Rows(slots[Operand(operand.node)], *operand.rows))
            slots[operand] = len(slots)
    kept = len(slots)
    for piece in cut.pieces:
        for node in piece.results:
            slots[Operand(node)] = len(slots)
    results = tuple(slots[Operand(node)] for node in returned)
    return Outline(
        regions=tuple(
            region_of(cut.pieces[first], [cut.names[first].to(cut.names[other]) for other in others])
            for first, *others in cut.members()
        ),
        calls=tuple(_calls(cut, slots, kept={*range(kept), *results})),
        inputs=len(placeholders),
        rows=tuple(rows),
        slots=len(slots),
        outputs=results,
    )


def _calls(cut: _Cut, slots: Mapping[Operand, int], kept: set[int]) -> Iterator[RegionCall]:
    read = [tuple(slots[operand] for operand in piece.operands) for piece in cut.pieces]
    written = [tuple(slots[Operand(node)] for node in piece.results) for piece in cut.pieces]
    last = {slot: index for index, used in enumerate(read) for slot in used if slot not in kept}
    for index, (region, inputs, outputs) in enumerate(zip(cut.regions, read, written, strict=True)):
        freed = tuple(slot for slot in dict.fromkeys(inputs) if last.get(slot) == index)
        yield RegionCall(region, inputs, outputs, freed)


def _runs(graph: Graph) -> Iterator[tuple[Node, ...]]:
    """Nodes in a row that stand in the same layer, or between two."""
    layers: list[tuple[str, Node]] = []
    for node in graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        if node.op not in ("call_function", "call_method") or _changes_a_mode(node):
            raise WholeGraphError(f"{node.name} may depend on more than its arguments, or change what others depend on")
        layers.append((_layer(node, layers[-1][0] if layers else ""), node))
    for _, run in groupby(layers, key=lambda pair: pair[0]):
        yield tuple(node for _, node in run)


def _changes_a_mode(node: Node) -> bool:
    name = operation(node)
    if "set_grad" in name and node.args == (False,):  # as it is already
        return False
    return any(word in name for word in _CHANGES_A_MODE)


def _layer(node: Node, before: str) -> str:
    """Path of the outermost layer that a node stands in, "" for none; a node without a record goes with the one before it."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return before
    paths = (str(path) for path, _ in stack.values())
    return next((path for path in paths if _LAYER.search(path)), "")
