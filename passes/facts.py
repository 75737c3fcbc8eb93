"""What the finders ask about a whole graph: order, aliases, writers, outputs, attention calls. Computed once, never changed."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Graph, Node

from alignedkv_compile.reasons import Reason

from .attention import attention_calls
from .nodes import Declined, fake, mutated_by, operation, storage_of, tensor_of, tensors_of
from .records import AttentionCall


@dataclass(frozen=True)
class GraphFacts:
    """Facts about one graph.

    Attributes:
        graph: the graph they are about.
        order: position of each node.
        placeholders: the graph's inputs, in order.
        outputs: what the graph returns, in order.
        calls: every softmax attention, over a cache or not, in graph order.
        inference_only: False when grad mode is on and an input requires grad.
    """

    graph: Graph
    order: dict[Node, int]
    placeholders: tuple[Node, ...]
    outputs: tuple[object, ...]
    calls: tuple[AttentionCall, ...]
    inference_only: bool
    _by_storage: dict[int, tuple[Node, ...]]
    _writers: dict[Node, tuple[Node, ...]]

    def aliases(self, node: Node) -> tuple[Node, ...]:
        """Nodes whose tensors share the storage of this node's tensor, itself included, in graph order.

        Fake tensors alias exactly where real ones do, so a view made by any operation is found.
        """
        tensor = tensor_of(node)
        storage = storage_of(tensor) if tensor is not None else None
        return (node,) if storage is None else self._by_storage[storage]

    def shares_storage(self, left: Node, right: Node) -> bool:
        return right in self.aliases(left)

    def writers(self, node: Node) -> tuple[Node, ...]:
        """Nodes that write this node's memory in place, through it or through any alias, in graph order."""
        found = {writer for alias in self.aliases(node) for writer in self._writers.get(alias, ())}
        return tuple(sorted(found, key=self.order.__getitem__))

    def written_between(self, node: Node, start: Node, stop: Node) -> bool:
        """Whether this node's memory is written strictly between two nodes."""
        return any(self.order[start] < self.order[writer] < self.order[stop] for writer in self.writers(node))

    def is_returned(self, node: Node) -> bool:
        """Whether the graph returns this node's tensor or a view of it."""
        return any(alias in self.outputs for alias in self.aliases(node))

    def is_cache_input(self, node: Node) -> bool:
        """Whether a node is a graph input that may be a cache: floating, with four dimensions."""
        tensor = tensor_of(node)
        return operation(node) == "placeholder" and tensor is not None and tensor.dim() == 4 and tensor.is_floating_point()

    def check_unshared(self, cache: Node, name: str) -> None:
        """Refuse a cache whose rows are not contiguous or whose memory is another input's too.

        Raises:
            Declined: naming the other input.
        """
        if not fake(cache).stride(3) == 1 and fake(cache).shape[3] != 1:
            raise Declined(Reason.MEMORY, f"the last dimension of {name} is not contiguous")
        others = [other for other in self.placeholders if other is not cache and self.shares_storage(cache, other)]
        if others:
            raise Declined(Reason.MEMORY, f"{name} shares its storage with another input ({others[0].name})")

    def attention_over(self, operand: Node, reader: Node) -> Node | None:
        """The attention call that a node belongs to, if it reads ``operand`` as that call's K or V and as nothing else."""
        for call in self.calls:
            if operand in call.operands:
                continue
            if reader is call.scores and operand is call.key:
                return call.node
            if reader is call.value_reader and operand is call.value:
                return call.node
        return None

    def users(self, node: Node) -> tuple[Node, ...]:
        """Direct users, in graph order."""
        return tuple(sorted(node.users, key=self.order.__getitem__))


def gather_facts(graph: Graph, *, inference_only: bool) -> GraphFacts:
    """Read a graph once. Its nodes carry Dynamo's fake values in ``meta["example_value"]``."""
    by_storage: dict[int, list[Node]] = {}
    writers: dict[Node, list[Node]] = {}
    for node in graph.nodes:
        for storage in {storage_of(tensor) for tensor in tensors_of(node)} - {None}:
            by_storage.setdefault(storage, []).append(node)  # type: ignore[arg-type]
        for written in mutated_by(node):
            writers.setdefault(written, []).append(node)
    output = graph.output_node()
    returned = output.args[0]
    return GraphFacts(
        graph=graph,
        order={node: position for position, node in enumerate(graph.nodes)},
        placeholders=tuple(node for node in graph.nodes if operation(node) == "placeholder"),
        outputs=tuple(returned) if isinstance(returned, (tuple, list)) else (returned,),
        calls=attention_calls(graph),
        inference_only=inference_only,
        _by_storage={storage: tuple(nodes) for storage, nodes in by_storage.items()},
        _writers={node: tuple(found) for node, found in writers.items()},
    )
