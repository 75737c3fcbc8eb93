"""Replacing one attention call by the aligned read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch.fx import Node
from torch.fx.node import Argument

from alignedkv_compile.ops import aligned_read_attention, certified_read_attention
from alignedkv_compile.torch_private import OpOverload

from .editor import GraphEditor
from .nodes import example_size, fake, same
from .records import AttentionSite


class AlignmentOptions(Protocol):
    """What the passes need of :class:`alignedkv_compile.options.Options`."""

    @property
    def tolerance(self) -> float: ...

    def least_context(self, device: torch.device, pairs: int) -> int: ...

    @property
    def stats(self) -> bool: ...

    @property
    def certified(self) -> bool: ...

    @property
    def cuda_graphs(self) -> bool: ...

    def unit_roundoff(self, dtype: torch.dtype) -> float: ...


@dataclass(frozen=True)
class StatisticsInputs:
    """The graph inputs in which reads record what they did; which ones there are decides which operator reads.

    Attributes:
        counters: int64 ``[sites, len(COUNTER_FIELDS)]``, or None when nothing is counted.
        bounds: float32 ``[sites, 2, heads]``, or None when reads are not certified.
    """

    counters: Node | None = None
    bounds: Node | None = None

    @property
    def operator(self) -> OpOverload:
        read = aligned_read_attention if self.bounds is None else certified_read_attention
        return read.default if self.counters is None else read.counted

    def arguments(self, site: int) -> dict[str, Argument]:
        """The operator's arguments for these inputs."""
        tensors = {"counters": self.counters, "bounds": self.bounds}
        given: dict[str, Argument] = {name: node for name, node in tensors.items() if node is not None}
        return {**given, "site": site} if given else {}


def replace_attention(
    site: AttentionSite,
    editor: GraphEditor,
    options: AlignmentOptions,
    *,
    key: Node,
    value: Node,
    planes: Node | None,
    length: Node | int,
    statistics: StatisticsInputs,
) -> None:
    """Put an aligned or a certified read in the place of a site's attention, and erase the chains that only it used.

    Args:
        key, value: the cache tensors or append buffers, ``[B, H, C, D]``.
        length: live rows, the bound of what is read.
    """
    original = fake(site.attention)
    with editor.before(site.attention, site.attention):
        mask = None if site.mask is None else editor.current(site.mask)
        while mask is not None and fake(mask).dim() < 4:
            mask = editor.method("unsqueeze", mask, 0)
        result = editor.function(
            statistics.operator,
            editor.current(site.query),
            key,
            value,
            planes,
            mask,
            None,
            length=length,
            scale=site.scale,
            softcap=0.0,
            tolerance=float(options.tolerance),
            unit_roundoff=options.unit_roundoff(fake(key).dtype),
            min_context=least_context(site, options),
            **statistics.arguments(site.index),
        )
        result = _with_strides_of(original, result, editor)
    result.meta["tensor_meta"] = site.attention.meta.get("tensor_meta")
    editor.replace(site.attention, result)
    for operand in (site.key, site.value):
        for node in reversed(operand.chain):
            if not node.users:
                editor.erase(node)


def least_context(site: AttentionSite, options: AlignmentOptions) -> int:
    """Live rows below which a site's read takes every bit."""
    written = fake(site.key.write)
    return options.least_context(written.device, int(example_size(written.shape[0])) * int(example_size(written.shape[1])))


def _with_strides_of(original: torch.Tensor, result: Node, editor: GraphEditor) -> Node:
    """Lay the result out as the original is: a ``view`` that Dynamo recorded behind the attention relies on its strides.

    Inductor fuses this copy, or finds that there is none to make (one query row).
    """
    if _same_layout(original, fake(result)):
        return result
    strides = [example_size(stride) for stride in original.stride()]
    order = sorted(range(4), key=strides.__getitem__, reverse=True)
    inverse = [order.index(dim) for dim in range(4)]
    permuted = editor.method("permute", result, *order)
    dense = editor.method("contiguous", permuted)
    return editor.method("permute", dense, *inverse)


def _same_layout(left: torch.Tensor, right: torch.Tensor) -> bool:
    return all(same(left.shape[dim], 1) or same(left.stride(dim), right.stride(dim)) for dim in range(left.dim()))
