"""A part of a rewritten graph as a graph of its own, and what tells whether two parts are the same.

Two parts are the same region if their nodes differ only in which tensors they are given, in the symbols of these tensors'
sizes, and in the row of the statistics that a read records in. Anything that could make a compiled region depend on more than
its arguments keeps the graph whole.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import sympy
import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import Argument, map_arg

from alignedkv_compile.ops import is_ours
from alignedkv_compile.outlined import Region
from alignedkv_compile.torch_private import OpOverload, placeholder_symbol, tree_leaves

from .nodes import arguments, depends_on_data, example, is_symbolic, mutated_by, same, storage_of, tensor_of

_V = TypeVar("_V")

_RECORDS = ("counters", "bounds")
"""Arguments of our reads of which row ``site`` is written."""


class WholeGraphError(Exception):
    """The graph cannot be cut; ``str()`` of it says why."""


@dataclass(frozen=True)
class Operand:
    """An input of a region: a node's value, or with ``rows`` (first, count) these of its first dimension."""

    node: Node
    rows: tuple[int, int] | None = None


@dataclass(frozen=True, eq=False)
class Inputs:
    """The sizes among a graph's inputs.

    Attributes:
        defining: for a symbol the input that Inductor takes it from.
        equal: for an input that is known to equal a symbol, the input that defines this one.
    """

    defining: Mapping[sympy.Symbol | None, Node]
    equal: Mapping[Node, Node]

    @classmethod
    def of(cls, graph: Graph) -> Inputs:
        sizes = [
            (node, value) for node in graph.find_nodes(op="placeholder") if isinstance(value := example(node), torch.SymInt)
        ]
        defining = {placeholder_symbol(value): node for node, value in sizes}
        return cls(defining, {node: defining[value.node.expr] for node, value in sizes if value.node.expr in defining})


@dataclass(frozen=True, eq=False)
class Piece:
    """A run of nodes between two borders.

    Attributes:
        operands: sizes first, then tensors as they come up.
        results: nodes that are read outside.
        first_site: of the reads in it; their rows of the statistics are counted from there.
    """

    nodes: tuple[Node, ...]
    operands: tuple[Operand, ...]
    results: tuple[Node, ...]
    first_site: int
    inputs: Inputs

    def by_node(self, values: Sequence[_V]) -> dict[Node, _V]:
        """For each node that is read here, but stands outside, the one of ``values`` (of operands) that belongs to it."""
        of_operand = {operand.node: value for operand, value in zip(self.operands, values, strict=True)}
        return {**{node: of_operand[one] for node, one in self.inputs.equal.items() if one in of_operand}, **of_operand}


def piece_of(nodes: tuple[Node, ...], inputs: Inputs) -> Piece:
    inside = set(nodes)
    sites = [site for node in nodes if (site := _site(node)) is not None]
    rows = (min(sites), max(sites) + 1 - min(sites)) if sites else None
    operands: dict[Operand, None] = {}
    for node in nodes:
        recorded = _recorded_in(node)
        for operand in node.all_input_nodes:
            if operand not in inside:
                operands[Operand(inputs.equal.get(operand, operand), rows if operand in recorded else None)] = None
    results = tuple(node for node in nodes if any(user not in inside for user in node.users))
    for value in (*(operand.node for operand in operands), *results):
        _check_border(value)
    _check_aliases(nodes, tuple(operand.node for operand in operands))
    others = [operand for operand in operands if tensor_of(operand.node) is not None]
    sizes = _sizes([operand.node for operand in operands], inputs)
    sizes += [operand for operand in operands if operand not in others and operand not in sizes]
    return Piece(nodes, (*sizes, *others), results, min(sites, default=0), inputs)


def _sizes(operands: Sequence[Node], inputs: Inputs) -> list[Operand]:
    """The graph's inputs that define the symbols in the operands' sizes, as far as no operand has such a size itself."""
    values = [example(node) for node in operands]
    defined = {size for value in values if isinstance(value, torch.Tensor) for size in _bare_symbols(value)}
    sizes = []
    for symbol in _symbols(values):
        if symbol in inputs.defining:
            sizes.append(Operand(inputs.defining[symbol]))
        elif symbol not in defined:
            raise WholeGraphError(f"no input is {symbol}")
    return sizes


def _bare_symbols(value: torch.Tensor) -> Iterator[sympy.Symbol]:
    for size in value.shape:
        if is_symbolic(size) and isinstance(symbol := size.node.expr, sympy.Symbol):  # type: ignore[attr-defined]
            yield symbol


def _check_border(node: Node) -> None:
    value = example(node)
    if isinstance(value, torch.Tensor):
        sizes: Sequence[object] = (*value.shape, *value.stride()) if value.layout == torch.strided else (None,)
    else:
        sizes = (value,)
    if not all(isinstance(size, int | torch.SymInt) and not depends_on_data(size) for size in sizes):
        raise WholeGraphError(f"{node.name} cannot be handed from one region to another")


def _check_aliases(nodes: Sequence[Node], operands: Sequence[Node]) -> None:
    """Where a region writes what two of its arguments share, compiled code depends on how they overlap."""
    written = {storage_of(tensor) for node in nodes for one in mutated_by(node) if (tensor := tensor_of(one)) is not None}
    storages = [storage_of(tensor) for node in operands if (tensor := tensor_of(node)) is not None]
    if None in written or None in storages or any(storages.count(storage) > 1 for storage in written):
        raise WholeGraphError("two arguments of a region share memory that it writes")


def _recorded_in(node: Node) -> tuple[Node, ...]:
    """The statistics of one of our reads."""
    bound = _our_arguments(node)
    return tuple(value for name in _RECORDS if isinstance(value := bound.get(name), Node))


def _site(node: Node) -> int | None:
    site = _our_arguments(node).get("site")
    return site if isinstance(site, int) else None


def _our_arguments(node: Node) -> dict[str, object]:
    if not is_ours(node.target) or not isinstance(node.target, OpOverload):
        return {}
    return arguments(node, [argument.name for argument in node.target._schema.arguments])


def _symbols(values: Sequence[object]) -> dict[sympy.Symbol, None]:
    """Every symbol in these fakes' sizes, as they come up: a name tells layers apart, the order does not."""
    found: dict[sympy.Symbol, None] = {}
    for value in values:
        sizes = (*value.shape, *value.stride()) if isinstance(value, torch.Tensor) else (value,)
        for size in sizes:
            if isinstance(size, torch.SymInt):
                found |= dict.fromkeys(sorted(size.node.expr.free_symbols, key=str))
    return found


class Names:
    """Names for the symbols of a piece, in the order in which they come up: the same for pieces that differ in symbols only."""

    def __init__(self) -> None:
        self._names: dict[sympy.Symbol, sympy.Symbol] = {}

    def size(self, value: object) -> Hashable:
        """A size in these names, with all that the compiler knows of it."""
        if not isinstance(value, torch.SymInt):
            return value
        expression, ranges = value.node.expr, value.node.shape_env.var_to_range
        for symbol in sorted(expression.free_symbols - self._names.keys(), key=str):
            self._names[symbol] = sympy.Symbol(f"size_{len(self._names)}")
        known = tuple((str(self._names[one]), str(ranges.get(one))) for one in sorted(expression.free_symbols, key=str))
        return str(expression.xreplace(self._names)), str(value.node.hint), known

    def to(self, other: Names) -> dict[sympy.Symbol, sympy.Symbol]:
        """For each symbol of the piece the one that has its name in another."""
        return dict(zip(self._names, other._names, strict=True))


def signature(piece: Piece, names: Names) -> Hashable:
    """What a region is compiled from: equal for two pieces that the same code serves."""
    size = names.size
    storages: dict[int | None, int] = {}

    def described(operand: Operand) -> Hashable:
        value = tensor_of(operand.node)
        if value is None:
            return size(example(operand.node))
        sizes = tuple(size(part) for part in (*value.shape, *value.stride()))
        shared = storages.setdefault(storage_of(value), len(storages))
        offset = 0 if operand.rows else size(value.storage_offset())
        rows = operand.rows and operand.rows[1]
        return (type(value), value.dtype, value.device, sizes, offset, value.requires_grad, shared, rows)

    places: dict[Node, Hashable] = {**piece.by_node([("operand", place) for place in range(len(piece.operands))])}
    places |= {node: ("node", place) for place, node in enumerate(piece.nodes)}
    return (
        tuple(described(operand) for operand in piece.operands),
        tuple((node.op, node.target, _plain(_arguments(node, piece), places)) for node in piece.nodes),
        tuple(places[node] for node in piece.results),
    )


def _arguments(node: Node, piece: Piece) -> tuple[tuple[Argument, ...], dict[str, Argument]]:
    """What a node is called with in a region: ``site`` counted from the region's first."""
    site, kwargs = _site(node), dict(node.kwargs)
    if site is None:
        return node.args, kwargs
    if "site" in kwargs:
        return node.args, {**kwargs, "site": site - piece.first_site}
    return (*node.args[:-1], site - piece.first_site), kwargs  # the last argument of each such overload


def _plain(value: object, places: Mapping[Node, Hashable]) -> Hashable:
    """An argument with nodes by their places; numbers keep their types, since 1, 1.0 and True are equal."""
    if isinstance(value, Node):
        return places[value]
    if isinstance(value, (tuple, list)):
        return (type(value).__name__, *(_plain(item, places) for item in value))
    if isinstance(value, dict):
        return tuple((key, _plain(item, places)) for key, item in sorted(value.items()))
    if isinstance(value, slice):
        return ("slice", *(_plain(item, places) for item in (value.start, value.stop, value.step)))
    if any(isinstance(leaf, (torch.SymInt, torch.Tensor)) for leaf in tree_leaves(value)) or not isinstance(value, Hashable):
        raise WholeGraphError(f"an argument that is no plain value: {value!r}")
    return (type(value).__name__, repr(value) if isinstance(value, float) else value)


def region_of(piece: Piece, others: Sequence[Mapping[sympy.Symbol, sympy.Symbol]]) -> Region:
    """The piece as a module of its own; ``others`` have its code run with other symbols."""
    graph = Graph()
    arguments = []
    fakes = []
    for place, operand in enumerate(piece.operands):
        value = example(operand.node)
        if operand.rows is not None and isinstance(value, torch.Tensor):
            with value.fake_mode:  # type: ignore[attr-defined]
                value = torch.empty((operand.rows[1], *value.shape[1:]), dtype=value.dtype, device=value.device)
        copied = graph.placeholder(f"argument_{place}")
        copied.meta = {"example_value": value}
        copied._dynamo_source = getattr(operand.node, "_dynamo_source", None)
        arguments.append(copied)
        fakes.append(value)
    copies = piece.by_node(arguments)
    for node in piece.nodes:
        copied = graph.node_copy(node, lambda old: copies[old])
        args, kwargs = _arguments(node, piece)
        copied.args, copied.kwargs = map_arg(args, lambda old: copies[old]), map_arg(kwargs, lambda old: copies[old])
        copies[node] = copied
    graph.output(tuple(_as_expected(graph, copies[node]) for node in piece.results))
    return Region(GraphModule({}, graph), tuple(fakes), tuple(others))


def _as_expected(graph: Graph, node: Node) -> Node:
    """A result with the strides that Dynamo saw: a decomposition may give it others, and regions are compiled one by one."""
    tensor = tensor_of(node)
    if tensor is None or not _is_contiguous(tensor):
        return node
    result = graph.call_method("contiguous", (node,))
    result.meta["example_value"] = tensor
    return result


def _is_contiguous(tensor: torch.Tensor) -> bool:
    """Without a guard on sizes that are symbols."""
    expected: int | torch.SymInt = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
        if not same(size, 1) and not same(stride, expected):
            return False
        expected = expected * size
    return True
