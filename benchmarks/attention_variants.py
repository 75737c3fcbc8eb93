"""What the attention benchmark compares. Every variant maps one layer's decode step to ``[1, Hq, 1, D]``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention

from alignedkv_compile import lowering
from alignedkv_compile.arena_memory import zeroed_arena
from alignedkv_compile.break_even import NEVER
from alignedkv_compile.layout import LONGEST_WAIT, TURNS_BYTES, arena_layout
from alignedkv_compile.ops import COUNTER_FIELDS, aligned_read_attention
from alignedkv_compile.options import UNIT_ROUNDOFF
from alignedkv_compile.plane_builder import PLANE_BUILDER
from attention_inputs import Layer

ALIGNED, STREAM, PACKED, REPEATED, GROUPED = "aligned", "stream", "sdpa packed", "sdpa repeated", "sdpa enable_gqa"
DEFAULT = "default"

DESCRIPTIONS = {
    ALIGNED: "this backend's kernel at the given tolerance, byte counters on",
    STREAM: "this backend's kernel at tolerance 0, byte counters on: streams the cache in its own dtype",
    DEFAULT: "this backend's kernel as a model on this machine runs it by default, byte counters on",
    PACKED: "eager SDPA, the query heads of a group as rows of one head, no mask: what transformers runs eagerly",
    REPEATED: "compiled by Inductor: K and V repeated per query head, bool mask: what a compiled model with StaticCache runs",
    GROUPED: "compiled by Inductor: SDPA with enable_gqa, no mask: what a compiled model with DynamicCache runs",
}


@dataclass
class Prepared:
    """One layer with what the variants need beside it.

    Attributes:
        layer: the tensors.
        mask: bool ``[1, 1, 1, C]``, all True: a StaticCache that is exactly full.
        planes: the layer's plane arena, written.
        counters: int64 ``[3, len(COUNTER_FIELDS)]``: a row for the aligned read, one for streaming, one for the default.
    """

    layer: Layer
    mask: torch.Tensor
    planes: torch.Tensor
    counters: torch.Tensor


Call = Callable[[Prepared], torch.Tensor]


def _mark_context(prepared: Prepared) -> None:
    """Ask Dynamo for a symbolic context, as a decoding model has it: one graph serves every length."""
    for tensor, dimension in (
        (prepared.layer.key, 2),
        (prepared.layer.value, 2),
        (prepared.mask, 3),
        (prepared.planes, 0),
    ):
        torch._dynamo.mark_dynamic(tensor, dimension)


def prepare(layer: Layer) -> Prepared:
    """Write the planes of a layer, through generated code."""
    planes = zeroed_arena(arena_layout(layer.key, layer.value).total, layer.key.device)
    PLANE_BUILDER.rebuild(planes, layer.key, layer.value, layer.context)
    mask = torch.ones(1, 1, 1, layer.context, dtype=torch.bool)
    prepared = Prepared(layer, mask, planes, torch.zeros(3, len(COUNTER_FIELDS), dtype=torch.int64))
    _mark_context(prepared)
    return prepared


def make_calls(tolerance: float, accuracy: torch.dtype | None) -> dict[str, Call]:
    """The variants by name. Call ``torch.compiler.reset()`` before making new ones for other heads or another dtype.

    Args:
        tolerance: of the aligned read.
        accuracy: dtype in whose rounding error it is measured; None is the cache's.
    """
    lowering.register()

    def aligned(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, planes: torch.Tensor, counters: torch.Tensor
    ) -> torch.Tensor:
        unit = UNIT_ROUNDOFF[accuracy or key.dtype]
        scale = key.shape[3] ** -0.5
        return aligned_read_attention(
            query, key, value, planes, None, None, key.shape[2], scale, 0.0, tolerance, unit, 1, counters, 0
        )

    def stream(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, counters: torch.Tensor) -> torch.Tensor:
        unit = UNIT_ROUNDOFF[key.dtype]
        scale = key.shape[3] ** -0.5
        return aligned_read_attention(query, key, value, None, None, None, key.shape[2], scale, 0.0, 0.0, unit, 1, counters, 1)

    def repeated(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        group = query.shape[1] // key.shape[1]
        return scaled_dot_product_attention(query, _repeat(key, group), _repeat(value, group), attn_mask=mask)

    def grouped(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return scaled_dot_product_attention(query, key, value, enable_gqa=True)

    def packed(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        rows = query.view(1, key.shape[1], -1, query.shape[3])
        return scaled_dot_product_attention(rows, key, value).reshape(query.shape)

    compiled = {function: torch.compile(function, fullgraph=True) for function in (aligned, stream, repeated, grouped)}

    return {
        ALIGNED: lambda p: compiled[aligned](p.layer.query, p.layer.key, p.layer.value, p.planes, p.counters),
        STREAM: lambda p: compiled[stream](p.layer.query, p.layer.key, p.layer.value, p.counters),
        PACKED: lambda p: packed(p.layer.query, p.layer.key, p.layer.value),
        REPEATED: lambda p: compiled[repeated](p.layer.query, p.layer.key, p.layer.value, p.mask),
        GROUPED: lambda p: compiled[grouped](p.layer.query, p.layer.key, p.layer.value),
    }


def default_call(tolerance: float, accuracy: torch.dtype | None, least_context: int, share: float) -> Call:
    """The variant :data:`DEFAULT`.

    Args:
        tolerance, accuracy: as :func:`make_calls` takes them.
        least_context, share: the operator's ``min_context`` and ``break_even``; no planes where the former is never reached.
    """

    def default(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, planes: torch.Tensor, counters: torch.Tensor
    ) -> torch.Tensor:
        unit = UNIT_ROUNDOFF[accuracy or key.dtype]
        numbers = (key.shape[2], key.shape[3] ** -0.5, 0.0, tolerance, unit, least_context)
        narrow = None if least_context == NEVER else planes
        return aligned_read_attention(query, key, value, narrow, None, None, *numbers, counters, 2, break_even=share)

    compiled = torch.compile(default, fullgraph=True)
    return lambda p: compiled(p.layer.query, p.layer.key, p.layer.value, p.planes, p.counters)


def settle(prepared: Prepared, default: Call) -> None:
    """Bring every head's turns to where many calls would have: one that waits does so for long, and any part of it
    has gone by."""
    layout = arena_layout(prepared.layer.key, prepared.layer.value)
    turns = prepared.planes.narrow(0, layout.turns, layout.heads * TURNS_BYTES).view(torch.int32).view(layout.heads, 2)
    for _ in range(LONGEST_WAIT.bit_length() + 1):
        turns[:, 0] = 0
        default(prepared)
    turns[:, 0] = (torch.rand(layout.heads) * (turns[:, 1] + 1)).int()


def _repeat(rows: torch.Tensor, group: int) -> torch.Tensor:
    """``[1, H, C, D]`` to ``[1, H * group, C, D]``, written as ``transformers`` writes ``repeat_kv``."""
    if group == 1:
        return rows
    batch, heads, length, dim = rows.shape
    return rows[:, :, None].expand(batch, heads, group, length, dim).reshape(batch, heads * group, length, dim)
