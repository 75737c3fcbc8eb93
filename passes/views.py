"""Folding away what stands between a cache and the attention that reads it: views, ``repeat_kv``, exact casts.

The chain of nodes is not matched against known patterns; it is followed axis by axis. A cache ``[B, H, T, D]`` has one label
per axis, and every view moves labels around:

    key[:, :, None]            [batch] [head] [] [row] [element]
    .expand(B, H, n, T, D)     [batch] [head] [repeat n] [row] [element]
    .reshape(B, H * n, T, D)   [batch] [head, repeat n] [row] [element]

The chain may be folded if it ends as ``[batch] [head, repeats...] [row] [element]``: then query head ``i``
reads KV head ``i // n``, which is what grouped-query attention computes. ``.repeat(1, n, 1, 1)`` ends as
``[repeat n, head]``: query head ``i`` reads KV head ``i % H``, and the query's heads must be put in the other order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.fx import Node

from alignedkv_compile.reasons import Reason

from .nodes import Declined, arguments, constant, fake, operation, same, tensor_of

_CASTS = frozenset(
    ["to", "type", "type_as", "float", "half", "bfloat16", "double", "contiguous", "clone", "detach", "alias", "_to_copy"]
)
_REGROUPINGS = frozenset(
    ["unsqueeze", "squeeze", "view", "reshape", "view_as", "reshape_as", "flatten", "unflatten", "_unsafe_view"]
)
_SUBSETS = frozenset(["getitem", "narrow", "select", "slice"])
_EXPANSIONS = frozenset(["expand", "expand_as", "broadcast_to"])
_SWAPS = frozenset(["transpose", "swapaxes", "swapdims"])
_FOLDABLE = _CASTS | _REGROUPINGS | _SUBSETS | _EXPANSIONS | _SWAPS | {"permute", "repeat_interleave", "repeat"}


@dataclass(frozen=True)
class Axis:
    """One labelled axis, or a part of one: ``batch``, ``head``, ``row``, ``element`` or ``repeat``."""

    label: str
    size: int | torch.SymInt


Axes = tuple[tuple[Axis, ...], ...]
"""For each dimension of a tensor the axes that it is made of, the slowest first; axes of size 1 are left out."""


Order = tuple[tuple[str, ...], ...]
"""For each dimension of an operand the labels that it may be made of."""

PLAIN: Order = (("batch",), ("head",), ("row",), ("element",))
TRANSPOSED_KEY: Order = (("batch",), ("head",), ("element",), ("row",))
FOLDED_KEY: Order = (("batch", "head"), ("element",), ("row",))
FOLDED_VALUE: Order = (("batch", "head"), ("row",), ("element",))


@dataclass(frozen=True)
class Fold:
    """An attention operand, followed back to the tensor that it is a rearrangement of.

    Attributes:
        base: the first node that is no view, expand or cast.
        chain: the nodes from behind ``base`` up to the operand, in graph order.
        order: how the operand must be laid out for the attention that it enters.
    """

    base: Node
    chain: tuple[Node, ...]
    order: Order = PLAIN


@dataclass(frozen=True)
class Repeats:
    """How a chain repeats KV heads.

    Attributes:
        count: how often (1 when it does not).
        tiled: all heads in turn rather than each in place.
    """

    count: int
    tiled: bool = False


def is_cast(node: Node) -> bool:
    """Whether a node changes at most a tensor's dtype, device or strides."""
    return operation(node) in _CASTS


def is_regrouping(node: Node) -> bool:
    """Whether a node is a view that keeps the elements and their order."""
    return operation(node) in _REGROUPINGS


def fold(operand: Node, order: Order = PLAIN) -> Fold:
    """Follow an operand back through views, expands and casts. Reads only the graph; see :func:`head_repeats` for the check."""
    chain: list[Node] = []
    node = operand
    while operation(node) in _FOLDABLE and node.args and tensor_of(node.args[0]) is not None and tensor_of(node) is not None:
        chain.append(node)
        node = node.args[0]  # type: ignore[assignment]
    return Fold(node, tuple(reversed(chain)), order)


def head_repeats(folded: Fold) -> Repeats:
    """How often the chain repeats each KV head.

    Raises:
        Declined: the chain is not a plain grouping of the ``[B, H, T, D]`` tensor that it starts from.
    """
    shape, dtype = fake(folded.base).shape, fake(folded.base).dtype
    axes: Axes = tuple(_axis(label, size) for label, size in zip(("batch", "head", "row", "element"), shape, strict=True))
    for node in folded.chain:
        source, result = fake(node.args[0]), fake(node)  # type: ignore[arg-type]
        if operation(node) in _CASTS:
            _check_cast(node, dtype)
        elif result.dtype != source.dtype:
            raise _detour(f"{operation(node)}, which reinterprets its bytes")
        axes = _follow(node, axes)
        if not _agrees(axes, result.shape):
            raise Declined(
                Reason.REARRANGED,
                f"the cache reaches attention through {operation(node)}, whose effect on its axes is not known",
            )
    return _grouping(axes, folded.order)


def _detour(through: str) -> Declined:
    return Declined(Reason.REARRANGED, f"the cache reaches attention through {through}")


def _axis(label: str, size: int | torch.SymInt) -> tuple[Axis, ...]:
    return () if same(size, 1) else (Axis(label, size),)


def _check_cast(node: Node, dtype: torch.dtype) -> None:
    result = fake(node)
    if result.device != fake(node.args[0]).device:  # type: ignore[arg-type]
        raise Declined(Reason.REARRANGED, "the cache is moved to another device before attention")
    if result.dtype != dtype and torch.promote_types(result.dtype, dtype) != result.dtype:
        raise Declined(Reason.REARRANGED, f"the cache is rounded from {_name(dtype)} to {_name(result.dtype)} before attention")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _follow(node: Node, axes: Axes) -> Axes:
    """Axes of a node's result, from the axes of its first argument."""
    name, source, result = operation(node), fake(node.args[0]), fake(node)  # type: ignore[arg-type]
    if name in _CASTS:
        return axes
    if name in _REGROUPINGS:
        return _regroup(axes, result.shape)
    if name in _SUBSETS:
        _check_whole(node, source, result)
        return _regroup(axes, result.shape)
    if name in _EXPANSIONS:
        return _expand(axes, source.shape, result.shape)
    if name in _SWAPS:
        first, second = _dimensions(node, ("dim0", "dim1"), source.dim())
        order = list(range(source.dim()))
        order[first], order[second] = order[second], order[first]
        return tuple(axes[position] for position in order)
    if name == "permute":
        order = _sizes(node.args[1:] or (node.kwargs.get("dims"),))
        return tuple(axes[position] for position in order)
    if name == "repeat_interleave":
        return _repeat_interleave(node, axes)
    counts = _sizes(node.args[1:] or (node.kwargs.get("repeats"),))
    if len(counts) != len(axes):
        raise _detour("repeat, which adds dimensions")
    return tuple(_axis("repeat", count) + axis for count, axis in zip(counts, axes, strict=True))


def _agrees(axes: Axes, shape: torch.Size) -> bool:
    return len(axes) == len(shape) and all(
        same(math.prod(axis.size for axis in dimension), size) for dimension, size in zip(axes, shape, strict=True)
    )


def _regroup(axes: Axes, shape: torch.Size) -> Axes:
    """Cut the sequence of axes where the new shape has its dimensions; an axis is never split."""
    remaining = [axis for dimension in axes for axis in dimension]
    result = []
    for size in shape:
        taken: list[Axis] = []
        while not same(math.prod(axis.size for axis in taken), size):
            if not remaining:
                raise Declined(Reason.REARRANGED, "the cache is reshaped across its axes before attention")
            taken.append(remaining.pop(0))
        result.append(tuple(taken))
    if remaining:
        raise Declined(Reason.REARRANGED, "the cache is reshaped across its axes before attention")
    return tuple(result)


def _check_whole(node: Node, source: torch.Tensor, result: torch.Tensor) -> None:
    """Indexing that keeps every element keeps all of them in order: slices only ever shrink, and a step is positive."""
    index = node.args[1] if operation(node) == "getitem" else ()
    items = index if isinstance(index, tuple) else (index,)
    if not all(item is None or item is Ellipsis or isinstance(item, (slice, int)) for item in items):
        raise Declined(Reason.REARRANGED, "the cache is indexed by a tensor before attention")
    if not same(source.numel(), result.numel()):
        raise Declined(Reason.REARRANGED, f"attention reads a part of the cache ({operation(node)} before it)")


def _expand(axes: Axes, source: torch.Size, result: torch.Size) -> Axes:
    new = len(result) - len(source)
    expanded = [_axis("repeat", size) for size in result[:new]]
    for axis, old, size in zip(axes, source, result[new:], strict=True):
        expanded.append(axis if same(old, size) else axis + _axis("repeat", size))
    return tuple(expanded)


def _repeat_interleave(node: Node, axes: Axes) -> Axes:
    bound = arguments(node, ("self", "repeats", "dim"))
    count, dim = bound.get("repeats"), bound.get("dim")
    if not isinstance(count, int) or not isinstance(dim, int):
        raise _detour("repeat_interleave with a repeat count per element")
    position = dim % len(axes)
    return (*axes[:position], axes[position] + _axis("repeat", count), *axes[position + 1 :])


def _dimensions(node: Node, names: tuple[str, ...], rank: int) -> list[int]:
    bound = arguments(node, ("self", *names))
    swapped = [value for name, value in bound.items() if name != "self"]
    if len(swapped) != len(names) or not all(isinstance(value, int) for value in swapped):
        raise _detour(f"{operation(node)} with dimensions that are not constant")
    return [value % rank for value in swapped]  # type: ignore[operator]


def _sizes(values: object) -> list[int]:
    """``permute(0, 2, 1)`` and ``permute((0, 2, 1))`` alike."""
    assert isinstance(values, tuple)
    flat = list(values[0]) if len(values) == 1 and isinstance(values[0], (tuple, list)) else list(values)
    if not all(isinstance(value, int) for value in flat):
        raise _detour("a view whose sizes are not constant")
    return flat


def _grouping(axes: Axes, order: Order) -> Repeats:
    if len(axes) != len(order):
        raise Declined(Reason.REARRANGED, "attention reads the cache in another order than [batch, head, row, element]")
    dimensions = zip(axes, order, strict=True)
    tiled = [_check_dimension([axis.label for axis in dimension], expected) for dimension, expected in dimensions]
    repeats = [axis for dimension in axes for axis in dimension if axis.label == "repeat"]
    return Repeats(math.prod(constant(axis.size) for axis in repeats), any(tiled))


def _check_dimension(labels: list[str], expected: tuple[str, ...]) -> bool:
    """Labels of size 1 are missing; repeats stand behind the head, or all before it, which is what is returned."""
    place = 0
    for number, label in enumerate(labels):
        if label == "repeat":
            others = [later for later in labels[number:] if later != "repeat"]
            if "head" in expected and not others:
                return False
            if others != ["head"] or labels[-1] != "head" or "head" not in expected[place:]:
                raise Declined(Reason.REARRANGED, "KV heads are repeated in another order than n times each or n times all")
            return True
        if label in expected[place:]:
            place = expected.index(label) + 1
        else:
            raise Declined(Reason.REARRANGED, "attention reads the cache in another order than [batch, head, row, element]")
    return False
