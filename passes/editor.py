"""Adding nodes to, and removing nodes from, the copied graph, with a record of both for :mod:`.verify`."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterable, Iterator

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import Argument, Target, map_arg

from alignedkv_compile.torch_private import FakeTensor, FakeTensorMode, mark_static_input

from .nodes import example, fake, operation

_ORIGIN_METADATA = ("stack_trace", "nn_module_stack", "source_fn_stack")


class GraphEditor:
    """Edits one graph; every node it inserts carries a fake value and the origin of the node it stands for.

    Dynamo traces under one fake mode and compiles under another that shares its symbols: values in ``meta`` belong to the
    first, example inputs to the second.

    Attributes:
        fake_mode: the mode of the values in ``meta``.
        added: inserted nodes, in order of insertion.
        removed: names of erased nodes.
        replaced: for each erased node that had users, what they use now.
        reads: the reads that took the place of attention, by the line of the report.
    """

    def __init__(self, module: GraphModule) -> None:
        self.graph = module.graph
        self.fake_mode = _fake_mode(module)
        self.added: list[Node] = []
        self.removed: list[str] = []
        self.replaced: dict[str, object] = {}
        self.reads: dict[int, Node] = {}
        self._origin: Node | None = None

    def placeholder(self, name: str, shape: tuple[int | torch.SymInt, ...], dtype: torch.dtype, device: torch.device) -> Node:
        """Append a graph input: a contiguous tensor that lives at one address from call to call."""
        with self.fake_mode:
            value = torch.empty(shape, dtype=dtype, device=device)
        last = [node for node in self.graph.nodes if operation(node) == "placeholder"][-1]
        with self.graph.inserting_after(last):
            node = self.graph.placeholder(name)
        node.meta["example_value"] = value
        node._dynamo_source = None  # AOTAutograd insists on the attribute
        mark_static_input(node)
        self.added.append(node)
        return node

    @contextlib.contextmanager
    def before(self, anchor: Node, origin: Node) -> Iterator[GraphEditor]:
        """Insert in front of ``anchor``; new nodes say that they come from where ``origin`` came from."""
        previous, self._origin = self._origin, origin
        with self.graph.inserting_before(anchor):
            yield self
        self._origin = previous

    @contextlib.contextmanager
    def after_both(self, first: Node, second: Node) -> Iterator[GraphEditor]:
        """Insert behind the later of two nodes."""
        order = {node: position for position, node in enumerate(self.graph.nodes)}
        later = max(first, second, key=order.__getitem__)
        with self.before(later.next, later):
            yield self

    def function(self, target: Target, *args: Argument, **kwargs: Argument) -> Node:
        return self._insert("call_function", target, args, kwargs)

    def method(self, target: str, *args: Argument, **kwargs: Argument) -> Node:
        return self._insert("call_method", target, args, kwargs)

    def size(self, node: Node, dim: int) -> Node | int:
        """A size of a tensor, as an argument: the number where it is one."""
        size = fake(node).shape[dim]
        return size if isinstance(size, int) else self.method("size", node, dim)

    def cast(self, node: Node, dtype: torch.dtype) -> Node:
        """A tensor in another dtype; itself where it has it already."""
        return node if fake(node).dtype == dtype else self.method("to", node, dtype)

    def plus(self, left: Node | int, right: Node | int) -> Node | int:
        """A sum of sizes, as an argument: the number where both are numbers."""
        if isinstance(left, int) and isinstance(right, int):
            return left + right
        return self.function(operator.add, left, right)

    def _insert(self, kind: str, target: Target, args: tuple[Argument, ...], kwargs: dict[str, Argument]) -> Node:
        node = self.graph.create_node(kind, target, args, kwargs)
        if self._origin is not None:
            node.meta.update({key: self._origin.meta[key] for key in _ORIGIN_METADATA if key in self._origin.meta})
        values, named = map_arg((args, kwargs), example)  # type: ignore[arg-type]
        with self.fake_mode, torch.no_grad():
            if kind == "call_method":
                value = getattr(values[0], target)(*values[1:], **named)  # type: ignore[arg-type]
            else:
                value = target(*values, **named)  # type: ignore[operator]
        node.meta["example_value"] = value
        self.added.append(node)
        return node

    def replace(self, node: Node, value: object) -> None:
        """Give the users of ``node`` a node, a constant or a tuple of them instead, and erase it."""
        for user in tuple(node.users):
            user.args = map_arg(user.args, lambda used: value if used is node else used)  # type: ignore[arg-type, return-value]
            user.kwargs = map_arg(user.kwargs, lambda used: value if used is node else used)  # type: ignore[arg-type, return-value]
        self.replaced[node.name] = value
        self.erase(node)

    def current(self, node: Node) -> Node:
        """The node that stands for a recorded one: one layer's query may be the previous layer's attention itself."""
        while node.name in self.replaced:
            node = self.replaced[node.name]  # type: ignore[assignment]
        return node

    def current_size(self, size: Node | int) -> Node | int:
        """The same for an argument that is a node or a number."""
        return self.current(size) if isinstance(size, Node) else size

    def erase_unused(self, nodes: Iterable[Node]) -> None:
        """Remove those of some nodes that nothing uses, once what they feed is gone."""
        candidates = set(nodes)
        for node in reversed(list(self.graph.nodes)):
            if node in candidates and not node.users:
                self.erase(node)

    def erase(self, node: Node) -> None:
        """Remove a node that has no users left."""
        self.removed.append(node.name)
        self.graph.erase_node(node)


def _fake_mode(module: GraphModule) -> FakeTensorMode:
    for node in module.graph.nodes:
        value = example(node)
        if isinstance(value, FakeTensor):
            return value.fake_mode
    return FakeTensorMode()
