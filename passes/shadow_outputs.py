"""What a shadow check compares: the operands and the result of every read, returned behind the graph's own outputs.

+ return (..., query, mask, result)          # one entry for each node that is no input already

The reads themselves and all that follows them stay what they are, so the caller gets the same numbers as without. A read whose
cache the graph writes once more behind it is not checked: the check looks at the cache when the call is over. Nor is the read
of an arena that is the cache, beside which there are no K and V to compare with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch.fx import Node

from alignedkv_compile.contract import ShadowRead, Where
from alignedkv_compile.ops import packed_read_attention

from .editor import GraphEditor
from .nodes import mutated_by

_PACKED = (packed_read_attention.default, packed_read_attention.counted)
_TENSORS = ("query", "key", "value", "mask", "sinks")


def return_reads(editor: GraphEditor) -> tuple[Node, ...]:
    """Have the graph return what its reads read and made, as far as that is no input; these outputs come last."""
    used = (node for read in _checkable(editor).values() for node in (*_operands(read).values(), read))
    added = tuple(dict.fromkeys(node for node in used if isinstance(node, Node) and node.op != "placeholder"))
    output = editor.graph.output_node()
    output.args = ((*output.args[0], *added),)  # type: ignore[misc]
    return added


def shadow_reads(editor: GraphEditor, inputs: Sequence[Node], added: Sequence[Node]) -> tuple[ShadowRead, ...]:
    """Where a check finds each read's operands.

    Args:
        inputs: of the rewritten graph.
        added: what :func:`return_reads` returned.
    """
    places = {node: Where(is_output=False, index=index) for index, node in enumerate(inputs)}
    places.update({node: Where(is_output=True, index=index) for index, node in enumerate(added)})

    def place(value: object) -> Where | None:
        return places[value] if isinstance(value, Node) else None

    reads = []
    for site, read in _checkable(editor).items():
        operands, choices = _operands(read), read.kwargs
        length = operands["length"]
        reads.append(
            ShadowRead(
                site=site,
                result=places[read],
                **{name: place(operands[name]) for name in _TENSORS},  # type: ignore[arg-type]
                length=length if isinstance(length, int) else places[length],  # type: ignore[index]
                scale=float(choices["scale"]),  # type: ignore[arg-type]
                softcap=float(choices["softcap"]),  # type: ignore[arg-type]
                unit_roundoff=float(choices["unit_roundoff"]),  # type: ignore[arg-type]
            )
        )
    return tuple(reads)


def _checkable(editor: GraphEditor) -> dict[int, Node]:
    """The reads of cache tensors after which nothing writes what they have read."""
    reads, checkable, written = set(editor.reads.values()), set[Node](), set[Node]()
    for node in reversed(editor.graph.nodes):
        written.update(map(_base, mutated_by(node)))
        if node in reads and node.target not in _PACKED and written.isdisjoint(map(_base, node.args[1:3])):
            checkable.add(node)
    return {site: read for site, read in editor.reads.items() if read in checkable}


def _base(node: Node) -> Node:
    """What a chain of writes in place began with."""
    while node.op != "placeholder" and (before := mutated_by(node)):
        node = next(iter(before))
    return node


def _operands(read: Node) -> Mapping[str, object]:
    query, key, value, _planes, mask, sinks = read.args
    return dict(zip((*_TENSORS, "length"), (query, key, value, mask, sinks, read.kwargs["length"]), strict=True))
