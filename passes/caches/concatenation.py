"""``cat([past, new], -2)``: recognising it, and who else reads the past or the concatenation.

A rewrite that never materialises the concatenation must know every reader of its data. Asking for sizes is fine: those become
expressions in the symbols that Dynamo passes as inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch.fx import Node

from alignedkv_compile.reasons import Reason

from ..editor import GraphEditor
from ..facts import GraphFacts
from ..nodes import Declined, concatenated, depends_on_data, example, fake, is_metadata, operation
from ..symbols import express, inputs_by_symbol, is_expressible
from ..views import fold


@dataclass(frozen=True)
class Concatenation:
    """``result = cat([past, new], 2)``: ``past`` is a graph input; ``[B, H, P, D]``, ``[B, H, S, D]``, ``[B, H, P + S, D]``.

    Attributes:
        kept: what the graph returns, the next past: ``result``, or a slice of its last rows.
        kept_rows: at most so many are kept; None for all.
    """

    result: Node
    past: Node
    new: Node
    kept: Node
    kept_rows: int | None = None

    def cropped_to(self, kept: Node, rows: int) -> Concatenation:
        """The same, of which only the last ``rows`` rows are returned, as ``kept``."""
        return replace(self, kept=kept, kept_rows=rows)


def concatenation(node: Node) -> Concatenation | None:
    """A concatenation of a 4-D graph input with new rows, or None."""
    parts = concatenated(node, 2)
    return None if parts is None or operation(parts[0]) != "placeholder" else Concatenation(node, *parts, kept=node)


def metadata_readers(parts: Concatenation) -> tuple[Node, ...]:
    """Users of the past and of the concatenation that only ask for sizes and the like."""
    return tuple(reader for tensor in (parts.past, parts.result) for reader in tensor.users if is_metadata(reader))


def check_lengths(key: Concatenation, value: Concatenation, facts: GraphFacts) -> None:
    """Past and new rows must be as many in K as in V; Dynamo gives each its own symbol, so a guard says so.

    Raises:
        Declined: they are not, or new rows change before both are concatenated.
    """
    first, last = sorted((key.result, value.result), key=facts.order.__getitem__)
    if any(facts.written_between(new, first, last) for new in (key.new, value.new)):
        raise Declined(Reason.WRITE_ORDER, "the new rows change between the concatenations of K and of V")
    for name, left, right in (("past", key.past, value.past), ("new rows", key.new, value.new)):
        sizes = (fake(left).shape[2], fake(right).shape[2])
        if any(map(depends_on_data, sizes)):
            raise Declined(Reason.LENGTH, f"the length of the {name} depends on data")
        if not bool(sizes[0] == sizes[1]):
            raise Declined(Reason.LENGTH, f"K and V have {name} of different lengths")


def check_readers(parts: Concatenation, name: str, facts: GraphFacts, kept: frozenset[Node]) -> None:
    """Refuse when anything but attention reads the data of the past or of the concatenation.

    Args:
        kept: readers of the concatenation that the rewrite replaces, whatever they compute.

    Raises:
        Declined: with the reader.
    """
    past, result = parts.past, parts.result
    others = [other for other in facts.placeholders if other is not past and facts.shares_storage(past, other)]
    if others:
        raise Declined(Reason.MEMORY, f"{name}'s past shares its storage with another input ({others[0].name})")
    writers = facts.writers(past) + facts.writers(result)
    if writers:
        raise Declined(Reason.SECOND_WRITER, f"{name} is also written by {operation(writers[0])}")
    for reader in facts.users(past):
        if reader is not result and not is_metadata(reader):
            raise Declined(Reason.SECOND_READER, f"{name}'s past is also read by {operation(reader)}")
    data_readers(parts, name, facts, kept)
    symbols = inputs_by_symbol(facts.placeholders)
    for reader in metadata_readers(parts):
        if not is_expressible(example(reader), symbols):
            raise Declined(Reason.LENGTH, f"{operation(reader)} of {name} is no expression of the graph's inputs")
    if not is_expressible(fake(past).shape[2], symbols):
        raise Declined(Reason.LENGTH, f"the length of {name}'s past is no input of the graph")


def data_readers(parts: Concatenation, name: str, facts: GraphFacts, kept: frozenset[Node]) -> frozenset[Node]:
    """The attention calls that read a concatenation, directly or through views; what is returned of it is no reader.

    Args:
        kept: as :func:`check_readers` takes them.

    Raises:
        Declined: something else reads its data.
    """
    found: set[Node] = set()
    result = parts.result
    pending = [result]
    while pending:
        node = pending.pop()
        for reader in node.users:
            if (
                reader in kept
                or reader is parts.kept
                or (node is result and (operation(reader) == "output" or is_metadata(reader)))
            ):
                continue
            call = facts.attention_over(node, reader)
            if call is not None:
                found.add(call)
            elif reader.users and reader.args[0] is node and fold(reader).base is result:
                pending.append(reader)
            else:
                culprit = node if operation(reader) == "output" else reader
                raise Declined(Reason.SECOND_READER, f"{name} is also read by {operation(culprit)}")
    return frozenset(found)


def express_metadata(parts: Sequence[Concatenation], editor: GraphEditor) -> None:
    """Sizes of the pasts and of the concatenations become expressions over the graph's other inputs."""
    symbols = inputs_by_symbol(node for node in editor.graph.nodes if node.op == "placeholder")
    for one in parts:
        for reader in metadata_readers(one):
            if not reader.users:
                editor.erase(reader)
                continue
            with editor.before(reader, reader):
                value = express(example(reader), symbols, editor.function)
            editor.replace(reader, value)
