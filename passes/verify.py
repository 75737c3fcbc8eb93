"""Checking the rewritten graph against the original: what should have changed did, and nothing else.

This does not trust the rewriters: it compares the graph before and after, node by node.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from alignedkv_compile.errors import GraphVerificationError
from alignedkv_compile.ops import NAMESPACE
from alignedkv_compile.torch_private import OpOverload

from .caches.kind import Expected
from .editor import GraphEditor
from .nodes import fake, mutated_by, operation, same
from .records import Pairing
from .worth import AlignmentOptions, options_for

READ = f"{NAMESPACE}::aligned_read_attention"
CERTIFIED_READ = f"{NAMESPACE}::certified_read_attention"
PACKED_READ = f"{NAMESPACE}::packed_read_attention"
CERTIFIED_PACKED_READ = f"{NAMESPACE}::certified_packed_read_attention"
WRITE = f"{NAMESPACE}::quantize_on_write"


@dataclass(frozen=True)
class GraphSnapshot:
    """A graph as text: for each node its name, operation, and arguments with nodes by name."""

    nodes: tuple[tuple[str, str, str], ...]
    attention: dict[str, torch.Tensor]
    """Fake values of the calls that will be replaced."""
    expected: tuple[Expected, ...]
    """What each pair's rewrite may change."""

    @property
    def metadata(self) -> frozenset[str]:
        return frozenset[str]().union(*(expected.metadata for expected in self.expected))


def snapshot(module: GraphModule, pairing: Pairing, options: AlignmentOptions) -> GraphSnapshot:
    """Remember a graph before it is rewritten."""
    return GraphSnapshot(
        nodes=tuple((node.name, _identity(node), _operands(node, {})) for node in module.graph.nodes),
        attention={site.attention.name: fake(site.attention) for site in pairing.rewritten},
        expected=tuple(pair.expected(options_for(pair.sites[0], options)) for pair in pairing.pairs),
    )


def verify_rewrite(
    module: GraphModule, before: GraphSnapshot, pairing: Pairing, editor: GraphEditor, options: AlignmentOptions
) -> None:
    """Check everything that the rewrite promises.

    Raises:
        GraphVerificationError: naming the node that broke a promise.
    """
    module.graph.lint()
    nodes = list(module.graph.nodes)
    added = set(editor.added)
    _check_removed(before, pairing, editor)
    _check_rest(before, nodes, added, editor)
    for node in added:
        _check_schema(node)
        _check_mutation(node)
    _check_sites(nodes, before, editor)
    _check_order(nodes)
    _check_counts(nodes, before, pairing, options)


def _identity(node: Node) -> str:
    return f"{node.op} {node.target}" if isinstance(node.target, str) else f"{node.op} {id(node.target)}"


def _operands(node: Node, renamed: dict[str, str]) -> str:
    """Arguments as text; ``renamed`` maps names of new nodes to the nodes they stand for."""
    return str(map_arg((node.args, node.kwargs), lambda used: _Name(renamed.get(used.name, used.name))))


class _Name(str):
    """A node's name inside printed arguments."""

    def __repr__(self) -> str:
        return f"%{self}"


def _check_removed(before: GraphSnapshot, pairing: Pairing, editor: GraphEditor) -> None:
    allowed = {node.name for site in pairing.rewritten for node in (site.attention, *site.call.inner)}
    allowed |= frozenset[str]().union(*(one.removed for one in before.expected))
    for name in editor.removed:
        if name not in allowed:
            raise GraphVerificationError(f"{name} was removed, though no record speaks of it")


def _check_rest(before: GraphSnapshot, nodes: list[Node], added: set[Node], editor: GraphEditor) -> None:
    """The nodes that neither came nor went: same operations, same arguments, same order."""
    removed, metadata = set(editor.removed), before.metadata
    renamed = {value.name: name for name, value in editor.replaced.items() if isinstance(value, Node)}
    expected = [entry for entry in before.nodes if entry[0] not in removed]
    actual = [node for node in nodes if node not in added]
    if [entry[0] for entry in expected] != [node.name for node in actual]:
        raise GraphVerificationError("nodes that no record speaks of moved or disappeared")
    for (name, identity, operands), node in zip(expected, actual, strict=True):
        if node.op == "output" or any(f"%{size}" in operands for size in metadata):
            continue
        if identity != _identity(node) or operands != _operands(node, renamed):
            raise GraphVerificationError(f"{name} changed, though no record speaks of it")


def _check_schema(node: Node) -> None:
    target = node.target
    if not isinstance(target, OpOverload):
        return
    formal = target._schema.arguments
    names = [argument.name for argument in formal]
    given = {*names[: len(node.args)], *node.kwargs}
    required = {argument.name for argument in formal if not argument.has_default_value()}
    if len(node.args) > len(names) or not required <= given <= set(names):
        raise GraphVerificationError(f"{node.name} does not fit the schema {target._schema}")


def _check_mutation(node: Node) -> None:
    """What a new node writes must be an input of the graph: that is what the runtime owns."""
    for written in mutated_by(node):
        if written.op != "placeholder":
            raise GraphVerificationError(f"{node.name} writes {written.name}, which is no input of the graph")


def _check_sites(nodes: list[Node], before: GraphSnapshot, editor: GraphEditor) -> None:
    """Each replaced attention is gone, and what stands in its place has its shape and dtype."""
    present = {node.name for node in nodes}
    for name, original in before.attention.items():
        result = editor.replaced.get(name)
        if name in present or not isinstance(result, Node):
            raise GraphVerificationError(f"{name} is only half rewritten")
        new = fake(result)
        if original.dtype != new.dtype or not all(map(same, original.shape, new.shape)):
            raise GraphVerificationError(f"{result.name} has another shape or dtype than {name} had")


def _check_order(nodes: list[Node]) -> None:
    """Planes that this graph writes are written before they are read."""
    all_written = {node.args[0] for node in nodes if operation(node) == WRITE}
    written: set[object] = set()
    for node in nodes:
        if operation(node) == WRITE:
            written.add(node.args[0])
        if operation(node) in (READ, CERTIFIED_READ) and node.args[3] in all_written - written:
            raise GraphVerificationError(f"{node.name} reads planes before they are written")


def _check_counts(nodes: list[Node], before: GraphSnapshot, pairing: Pairing, options: AlignmentOptions) -> None:
    counts = Counter(operation(node) for node in nodes)
    writes = sum(expected.writes for expected in before.expected)
    packed = sum(expected.packed_reads for expected in before.expected)
    reads = {READ: 0, CERTIFIED_READ: 0, PACKED_READ: 0, CERTIFIED_PACKED_READ: 0}
    reads[CERTIFIED_READ if options.certified else READ] = len(pairing.rewritten) - packed
    reads[CERTIFIED_PACKED_READ if options.certified else PACKED_READ] = packed
    for name, expected in {**reads, WRITE: writes}.items():
        if counts[name] != expected:
            raise GraphVerificationError(f"{counts[name]} nodes of {name} where {expected} belong")
