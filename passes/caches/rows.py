"""Rows of a preallocated cache ``[B, H, C, D]``: writing them in place in the forms that models do it, reading the first ones.

index_copy_(cache, 2, positions, rows)
cache[:, :, positions] = rows          # int64 [S]; negative ones count from the end
cache[:, :, start : start + S] = rows
cache[:, :, start : start + S].copy_(rows)

cache[:, :, :n]                        # what attention reads, where no mask hides the rows that are not written yet
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch.fx import Node

from ..editor import GraphEditor
from ..facts import GraphFacts
from ..nodes import arguments, depends_on_data, equal, example, fake, operation, same, tensor_of

INDEX_COPY = ("self", "dim", "index", "source")


@dataclass(frozen=True)
class RowWrite:
    """One write of ``rows`` at ``places`` of dimension 2.

    Attributes:
        node: what writes.
        cache: the tensor ``[B, H, C, D]`` that it is told to write.
        rows: ``[B, H, S, D]`` if the write is one that planes can follow; see :meth:`problem`.
        places: positions ``[S]``, or a slice of rows.
    """

    node: Node
    cache: Node
    rows: object
    places: object

    @property
    def operands(self) -> tuple[Node, ...]:
        """The nodes whose values say what is written where."""
        places = (self.places.start, self.places.stop) if isinstance(self.places, slice) else (self.places,)
        return tuple(operand for operand in (self.rows, *places) if isinstance(operand, Node))

    def problem(self, name: str) -> str:
        """Why planes cannot follow this write, or "".

        Args:
            name: of the cache, for people.
        """
        cache, rows = fake(self.cache), tensor_of(self.rows)
        casts = isinstance(self.places, slice)
        if rows is None or rows.dim() != 4 or not (rows.dtype == cache.dtype or (casts and rows.is_floating_point())):
            return f"the rows written to {name} are no 4-D tensor of its dtype"
        repeats = operation(self.node) != "index_copy_"
        if repeats and not all(equal(rows.shape[dim], cache.shape[dim]) for dim in (0, 1, 3)):
            return f"the rows written to {name} are repeated to its size"
        if isinstance(self.places, slice):
            first, last = _number(self.places.start, 0), _number(self.places.stop, cache.shape[2])
            if first is None or last is None or depends_on_data(first) or first < 0 or not equal(last - first, rows.shape[2]):
                return f"where rows are written to {name} is not known"
            return ""
        positions = tensor_of(self.places)
        if positions is None or positions.dim() != 1 or positions.dtype != torch.int64:
            return f"the positions written to {name} are no 1-D int64 tensor"
        if repeats and not equal(positions.shape[0], rows.shape[2]):
            return f"the rows written to {name} are repeated to its positions"
        return ""

    def is_at(self, other: RowWrite, facts: GraphFacts) -> bool:
        """Whether two writes fill rows of the same numbers, if nothing changes their operands in between."""
        if isinstance(self.places, slice) and isinstance(other.places, slice):
            pairs = ((self.places.start, other.places.start), (self.places.stop, other.places.stop))
            return all(_is_same_number(left, right, guarded=True) for left, right in pairs)
        if not isinstance(self.places, Node) or not isinstance(other.places, Node):
            return False
        return _are_one_view(self.places, other.places, facts)

    def new_rows(self, editor: GraphEditor) -> Node:
        """``[B, H, S, D]`` as the cache then holds them, for what is inserted behind the write."""
        assert isinstance(self.rows, Node)
        return editor.cast(editor.current(self.rows), fake(self.cache).dtype)

    def positions(self, editor: GraphEditor) -> Node:
        """int64 ``[S]``, none of them negative, for what is inserted behind the write."""
        if isinstance(self.places, slice):
            assert isinstance(self.rows, Node)
            rows = editor.current(self.rows)
            counted = editor.function(torch.arange, editor.size(rows, 2), device=fake(rows).device)
            start = self.places.start
            return counted if start is None else editor.function(operator.add, counted, editor.current_size(start))
        assert isinstance(self.places, Node)
        positions = editor.current(self.places)
        if operation(self.node) == "index_copy_":
            return positions
        return editor.function(torch.remainder, positions, editor.size(self.cache, 2))


def row_write(node: Node) -> RowWrite | None:
    """The write of rows that a node is, or None."""
    name = operation(node)
    if name == "index_copy_":
        bound = arguments(node, INDEX_COPY)
        cache = bound.get("self")
        if not _is_cache(cache) or bound.get("dim") not in (2, -2):
            return None
        return RowWrite(node, cache, bound.get("source"), bound.get("index"))  # type: ignore[arg-type]
    if name == "setitem" and len(node.args) == 3:
        cache, index, rows = node.args
        return _indexed(node, cache, index, rows)
    if name == "copy_" and len(node.args) == 2 and not node.kwargs:
        target, rows = node.args
        found = _indexed(node, target.args[0], target.args[1], rows) if _is_indexing(target) else None
        return found if found is not None and isinstance(found.places, slice) else None  # rows of an index are a copy
    return None


def first_rows(node: Node) -> Node | int | None:
    """``n`` of ``cache[:, :, :n]``, if the cache has so many rows; else None."""
    places = chosen_rows(node.args[0], node.args[1]) if _is_indexing(node) else None
    if not isinstance(places, slice) or places.step not in (None, 1) or not _is_same_number(places.start or 0, 0):
        return None
    return places.stop if places.stop is not None and _is_same_number(places.stop, fake(node).shape[2]) else None


def _indexed(node: Node, cache: object, index: object, rows: object) -> RowWrite | None:
    """``cache[index] = rows`` where the index chooses rows and takes everything else."""
    places = chosen_rows(cache, index)
    if isinstance(places, slice) and places.step not in (None, 1):
        return None
    return None if places is None else RowWrite(node, cache, rows, places)  # type: ignore[arg-type]


def chosen_rows(cache: object, index: object) -> Node | slice | None:
    """What stands at dimension 2 of an index of ``[B, H, C, D]`` that takes all of the others; else None."""
    if not _is_cache(cache) or not isinstance(index, tuple):
        return None
    assert isinstance(cache, Node)
    if any(part is Ellipsis for part in index):
        at = next(position for position, part in enumerate(index) if part is Ellipsis)
        index = (*index[:at], *(slice(None) for _ in range(5 - len(index))), *index[at + 1 :])
    index = (*index, *(slice(None) for _ in range(4 - len(index))))
    if len(index) != 4 or not all(_is_whole(index[dim], fake(cache).shape[dim]) for dim in (0, 1, 3)):
        return None
    return index[2] if isinstance(index[2], (Node, slice)) else None


def _is_indexing(node: object) -> TypeGuard[Node]:
    return isinstance(node, Node) and operation(node) == "getitem"


def _is_cache(node: object) -> bool:
    tensor = tensor_of(node)
    return tensor is not None and tensor.dim() == 4


def _is_whole(part: object, size: int | torch.SymInt) -> bool:
    if not isinstance(part, slice) or part.step not in (None, 1):
        return False
    return _is_same_number(part.start or 0, 0) and (part.stop is None or _is_same_number(part.stop, size))


def _number(value: object, default: int | torch.SymInt) -> int | torch.SymInt | None:
    """The integer that an argument is, a symbolic one where it is a node's; None where it is none."""
    number = default if value is None else example(value) if isinstance(value, Node) else value
    return number if isinstance(number, (int, torch.SymInt)) else None


def _is_same_number(left: object, right: object, *, guarded: bool = False) -> bool:
    """Whether two arguments are one integer: for certain, or ``guarded`` by a guard that then holds for the graph."""
    if left is right:
        return True
    first, second = _number(left, 0), _number(right, 0)
    return first is not None and second is not None and (equal if guarded else same)(first, second)


def _are_one_view(left: Node, right: Node, facts: GraphFacts) -> bool:
    """Whether two nodes are the same elements of one storage."""
    if left is right:
        return True
    first, second = tensor_of(left), tensor_of(right)
    if first is None or second is None or first.dim() != second.dim() or not facts.shares_storage(left, right):
        return False
    places = ((*one.shape, *one.stride(), one.storage_offset()) for one in (first, second))
    return first.dtype == second.dtype and all(map(equal, *places))
