"""Replacing one attention call by the aligned read."""

from __future__ import annotations

import abc
import operator
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.fx import Node
from torch.fx.node import Argument

from alignedkv_compile.ops import aligned_read_attention, certified_read_attention
from alignedkv_compile.torch_private import OpOverload

from .editor import GraphEditor
from .nodes import constant, example_size, fake, same
from .records import AttentionSite
from .worth import AlignmentOptions, break_even, least_context


@dataclass(frozen=True)
class StatisticsInputs:
    """The graph inputs in which reads record what they did; which ones there are decides which operator reads.

    Attributes:
        counters: int64 ``[sites, len(COUNTER_FIELDS)]``, or None when nothing is counted.
        bounds: float32 ``[sites, 2, heads]``, or None when reads are not certified.
    """

    counters: Node | None = None
    bounds: Node | None = None

    def arguments(self, site: int) -> dict[str, Argument]:
        """The operator's arguments for these inputs."""
        tensors = {"counters": self.counters, "bounds": self.bounds}
        given: dict[str, Argument] = {name: node for name, node in tensors.items() if node is not None}
        return {**given, "site": site} if given else {}


@dataclass(frozen=True, kw_only=True)
class CacheRead(abc.ABC):
    """What one aligned read reads.

    Attributes:
        length: live rows, the bound of what is read.
        mask: four-dimensional, its last dimension ``length`` or the cache's rows; or None.
        query: what meets these rows, ``[B, Hq, Q, Dk]``; None for the site's own query.
        finish: makes the attention's output of what the read returns; None where that is it already.
    """

    length: Argument
    mask: Node | None
    query: Node | None = None
    finish: Callable[[Node], Node] | None = None

    @abc.abstractmethod
    def operator(self, statistics: StatisticsInputs) -> OpOverload:
        """The operator that reads; which statistics it records decides its overload."""

    @property
    @abc.abstractmethod
    def operands(self) -> tuple[Argument, ...]:
        """The operator's arguments between the query and the mask."""

    @property
    def attributes(self) -> dict[str, Argument]:
        """What else it takes for this cache."""
        return {}

    @property
    @abc.abstractmethod
    def dtype(self) -> torch.dtype:
        """Of the cache's numbers."""


@dataclass(frozen=True)
class TensorRead(CacheRead):
    """A read of cache tensors.

    Attributes:
        key, value: the cache tensors or buffers, ``[B, H, C, D]``.
        planes: their planes, or None.
    """

    key: Node
    value: Node
    planes: Node | None

    def operator(self, statistics: StatisticsInputs) -> OpOverload:
        read = aligned_read_attention if statistics.bounds is None else certified_read_attention
        return read.default if statistics.counters is None else read.counted

    @property
    def operands(self) -> tuple[Argument, ...]:
        return self.key, self.value, self.planes

    @property
    def dtype(self) -> torch.dtype:
        return fake(self.key).dtype


def mask_of(site: AttentionSite, editor: GraphEditor) -> Node | None:
    """A site's masks as one of four dimensions: bool (True attends) or floating (added)."""
    attends: Node | None = None
    bias: Node | None = None
    for term in site.masks:
        assert isinstance(term.node, Node)
        mask = _four_dimensional(editor.current(term.node), term.folded, site, editor)
        if fake(mask).dtype == torch.bool:
            mask = editor.method("logical_not", mask) if term.prohibits else mask
            attends = mask if attends is None else editor.method("logical_and", attends, mask)
        else:
            mask = _scaled(mask, term.factor, editor)
            bias = mask if bias is None else editor.function(operator.add, bias, mask)
    if attends is None or bias is None:
        return attends if bias is None else bias
    least = torch.finfo(fake(bias).dtype).min
    return editor.method("masked_fill", bias, editor.method("logical_not", attends), least)


def _scaled(mask: Node, factor: float, editor: GraphEditor) -> Node:
    """A floating mask times a number; what prohibits stays what it is, so that the read knows it."""
    if factor == 1:
        return mask
    prohibited = editor.method("le", mask, torch.finfo(fake(mask).dtype).min / 2)
    return editor.function(torch.where, prohibited, mask, editor.function(operator.mul, mask, factor))


def _four_dimensional(mask: Node, folded: bool, site: AttentionSite, editor: GraphEditor) -> Node:
    if folded and fake(mask).dim() == 3 and not same(fake(mask).shape[0], 1):
        batch = editor.size(site.key.source, 0)
        return editor.method("unflatten", mask, 0, (batch, -1))
    while fake(mask).dim() < 4:
        mask = editor.method("unsqueeze", mask, 0)
    return mask


def replace_attention(
    site: AttentionSite,
    editor: GraphEditor,
    options: AlignmentOptions,
    statistics: StatisticsInputs,
    read: Callable[[AttentionSite, GraphEditor], CacheRead],
) -> None:
    """Put an aligned or a certified read in the place of a site's attention, and erase the chains that only it used.

    Args:
        read: what is read; called where nodes are inserted in front of the attention.
    """
    original = fake(site.attention)
    share = break_even(site, options)
    with editor.before(site.attention, site.attention):
        reads = read(site, editor)
        query = editor.current(site.query)
        if site.call.folded:
            query = editor.method("unflatten", query, 0, (editor.size(site.key.source, 0), -1))
        sinks = None if site.call.sinks is None else editor.current(site.call.sinks)
        tiles = site.key.repeats.count, constant(fake(site.key.source).shape[1])
        if site.key.repeats.tiled:
            query = _heads_swapped(query, 1, tiles, editor)
            sinks = None if sinks is None else _heads_swapped(sinks, 0, tiles, editor)
        mask = reads.mask
        if site.key.repeats.tiled and mask is not None and not same(fake(mask).shape[1], 1):
            mask = _heads_swapped(mask, 1, tiles, editor)
        result = editor.function(
            reads.operator(statistics),
            query if reads.query is None else reads.query,
            *reads.operands,
            mask,
            sinks,
            **reads.attributes,
            length=reads.length,
            scale=site.scale,
            softcap=site.call.softcap,
            tolerance=float(options.tolerance),
            unit_roundoff=options.unit_roundoff(reads.dtype),
            min_context=least_context(site, options),
            **statistics.arguments(site.index),
            **({"break_even": share} if share else {}),
        )
        editor.reads[site.index] = result
        result = result if reads.finish is None else reads.finish(result)
        if site.key.repeats.tiled:
            result = _heads_swapped(result, 1, tiles[::-1], editor)
        result = editor.cast(result, original.dtype)
        if original.dim() == 3:
            result = editor.method("flatten", result, 0, 1)
        result = _with_strides_of(original, result, editor)
    result.meta["tensor_meta"] = site.attention.meta.get("tensor_meta")
    editor.replace(site.attention, result)
    editor.erase_unused(site.call.inner)
    editor.erase_unused((*site.key.chain, *site.value.chain))


def _heads_swapped(node: Node, dim: int, tiles: tuple[int, int], editor: GraphEditor) -> Node:
    """Heads ``a * tiles[1] + b`` of a dimension in the order ``b * tiles[0] + a``."""
    apart = editor.method("unflatten", node, dim, tiles)
    return editor.method("flatten", editor.method("transpose", apart, dim, dim + 1), dim, dim + 1)


def _with_strides_of(original: torch.Tensor, result: Node, editor: GraphEditor) -> Node:
    """Lay the result out as the original is: a ``view`` that Dynamo recorded behind the attention relies on its strides.

    Inductor fuses this copy, or finds that there is none to make (one query row).
    """
    if _same_layout(original, fake(result)):
        return result
    strides = [example_size(stride) for stride in original.stride()]
    order = sorted(range(original.dim()), key=strides.__getitem__, reverse=True)
    inverse = [order.index(dim) for dim in range(original.dim())]
    permuted = editor.method("permute", result, *order)
    dense = editor.method("contiguous", permuted)
    return editor.method("permute", dense, *inverse)


def _same_layout(left: torch.Tensor, right: torch.Tensor) -> bool:
    return all(same(left.shape[dim], 1) or same(left.stride(dim), right.stride(dim)) for dim in range(left.dim()))
