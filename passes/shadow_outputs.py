"""What a shadow check compares: the operands and the result of every read, returned behind the graph's own outputs.

+ return (..., query, mask, result)          # one entry for each node that is no input already

The reads themselves and all that follows them stay what they are, so the caller gets the same numbers as without. A read whose
cache the graph writes once more behind it is not checked: the check looks at the cache when the call is over. Of an arena that
is the cache, it decodes K and V.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch.fx import Node

from alignedkv_compile.contract import CacheRows, PackedRows, ShadowRead, Where
from alignedkv_compile.ops import certified_packed_read_attention, packed_read_attention

from .editor import GraphEditor
from .nodes import mutated_by

_PACKED = tuple(
    getattr(read, overload)
    for read in (packed_read_attention, certified_packed_read_attention)
    for overload in ("default", "counted")
)


def return_reads(editor: GraphEditor) -> tuple[Node, ...]:
    """Have the graph return what its reads read and made, as far as that is no input; these outputs come last."""
    used = (node for read in _checkable(editor).values() for node in (*_operands(read), read))
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

    def number(value: object) -> int | Where:
        return value if isinstance(value, int) else places[value]  # type: ignore[index]

    def rows(read: Node) -> CacheRows | PackedRows:
        if read.target not in _PACKED:
            return CacheRows(*(places[node] for node in _rows(read)))
        (planes,) = _rows(read)
        constants = {name: read.kwargs[name] for name in ("heads", "value_dim", "dtype", "storage")}
        return PackedRows(places[planes], number(read.kwargs["capacity"]), **constants)  # type: ignore[arg-type]

    reads = []
    for site, read in _checkable(editor).items():
        query, mask, sinks = _others(read)
        choices = read.kwargs
        reads.append(
            ShadowRead(
                site=site,
                query=places[query],  # type: ignore[index]
                rows=rows(read),
                mask=place(mask),
                sinks=place(sinks),
                result=places[read],
                length=number(choices["length"]),
                scale=float(choices["scale"]),  # type: ignore[arg-type]
                softcap=float(choices["softcap"]),  # type: ignore[arg-type]
                unit_roundoff=float(choices["unit_roundoff"]),  # type: ignore[arg-type]
            )
        )
    return tuple(reads)


def _checkable(editor: GraphEditor) -> dict[int, Node]:
    """The reads after which nothing writes what they have read."""
    reads, checkable, written = set(editor.reads.values()), set[Node](), set[Node]()
    for node in reversed(editor.graph.nodes):
        written.update(map(_base, mutated_by(node)))
        if node in reads and written.isdisjoint(map(_base, _rows(node))):
            checkable.add(node)
    return {site: read for site, read in editor.reads.items() if read in checkable}


def _base(node: Node) -> Node:
    """What a chain of writes in place began with."""
    while node.op != "placeholder" and (before := mutated_by(node)):
        node = next(iter(before))
    return node


def _rows(read: Node) -> tuple[Node, ...]:
    """What holds the K and V that a read reads."""
    return read.args[1:2] if read.target in _PACKED else read.args[1:3]  # type: ignore[return-value]


def _others(read: Node) -> tuple[object, object, object]:
    """Query, mask and sinks."""
    return read.args[0], *read.args[-2:]  # type: ignore[return-value]


def _operands(read: Node) -> tuple[object, ...]:
    sizes = (read.kwargs[name] for name in ("length", "capacity") if name in read.kwargs)
    query, mask, sinks = _others(read)
    return query, *_rows(read), mask, sinks, *sizes
