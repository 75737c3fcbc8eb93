"""The meaning of the operators, in eager torch: readable first, and what runs outside Inductor.

The generated kernels make the same decisions from the same formulas (:mod:`alignedkv_compile.precision`); they differ from this
file only in the order of floating-point sums, so a row that sits on a threshold may fall on either side of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import library

from . import ops
from .arena import ArenaViews, arena_views, pack_row_order, pack_scales, pack_score_order, rounded_scale
from .layout import (
    BLOCK_ROWS,
    CODE_RANGE,
    HEADROOM,
    HI_STEP,
    MID_STEP,
    PLANES_VALID,
    SCORE_GROUP,
    ArenaLayout,
    arena_layout,
    padded_head_dim,
    score_ordered,
)
from .reference_head import ReadCounts, dither, hadamard, head_calls, read_full
from .reference_read import read_aligned
from .reference_worst_case import read_certified


def encode(rows: torch.Tensor, scale: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Nibbles of the planes hi and mid (uint8, padded to whole rows) of float32 ``rows [..., S, D]`` at ``positions [S]``."""
    factor = torch.where(scale > 0, CODE_RANGE / scale, 0.0)
    code = torch.floor(rows * factor[..., None] + dither(positions)[:, None] * HI_STEP)
    code = torch.nan_to_num(code, nan=0.0).clamp(-CODE_RANGE, CODE_RANGE - 1).to(torch.int32) + CODE_RANGE
    padding = padded_head_dim(rows.shape[-1]) - rows.shape[-1]
    code = torch.nn.functional.pad(code, (0, padding))
    return (code // HI_STEP).to(torch.uint8), (code // MID_STEP & 15).to(torch.uint8)


@library.impl(f"{ops.NAMESPACE}::quantize_on_write", "CompositeExplicitAutograd")
def quantize_on_write(
    planes: torch.Tensor, key: torch.Tensor, value: torch.Tensor, positions: torch.Tensor, capacity: int
) -> None:
    """See :data:`alignedkv_compile.ops.quantize_on_write`."""
    batch, heads, _, key_dim = key.shape
    layout = ArenaLayout(batch * heads, capacity, key_dim, value.shape[-1])
    views = arena_views(planes, layout)
    inside = (positions >= 0) & (positions < capacity)
    positions = positions[inside]
    keys = hadamard(key[:, :, inside].flatten(0, 1))
    values = value[:, :, inside].flatten(0, 1).float()

    key_scale, value_scale = (
        rounded_scale(rows.abs().amax(-1) * HEADROOM) if rows.numel() else rows.new_zeros(rows.shape[:-1])
        for rows in (keys, values)
    )
    inverse = torch.where(value_scale > 0, 1 / value_scale, 0.0)
    words = pack_scales(key_scale, value_scale, (values * inverse[..., None]).norm(dim=-1))
    views.scales[:, positions] = words
    hi, mid = encode(keys, key_scale, positions)
    if score_ordered(planes.device):
        views.key_hi[:, positions // SCORE_GROUP, :, positions % SCORE_GROUP] = pack_score_order(hi).movedim(0, 1)
    else:
        views.key_hi_rows[:, positions] = pack_row_order(hi)
    views.key_mid[:, positions] = pack_row_order(mid)
    hi, mid = encode(values, value_scale, positions)
    views.value_hi[:, positions] = pack_row_order(hi)
    views.value_mid[:, positions] = pack_row_order(mid)
    _sum_blocks(views, values, positions)


def _sum_blocks(views: ArenaViews, values: torch.Tensor, positions: torch.Tensor) -> None:
    """Add rows to their block's sum in order; a row that does not continue the block makes the sum unusable."""
    for index, position in enumerate(positions.tolist()):
        block, place = divmod(position, BLOCK_ROWS)
        row, count, total = values[:, index], views.value_count[:, block], views.value_sum[:, block]
        total = row if place == 0 else total + row
        usable = (count == place) | (place == 0)
        usable &= torch.isfinite(total).all(-1)
        views.value_sum[:, block] = total
        views.value_count[:, block] = torch.where(usable, place + 1, -1).to(torch.int32)


@library.impl(f"{ops.NAMESPACE}::aligned_read_attention", "CompositeExplicitAutograd")
def aligned_read_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    planes: torch.Tensor | None,
    mask: torch.Tensor | None,
    sinks: torch.Tensor | None,
    length: int,
    scale: float,
    softcap: float,
    tolerance: float,
    unit_roundoff: float,
    min_context: int,
) -> torch.Tensor:
    """See :data:`alignedkv_compile.ops.aligned_read_attention`."""
    call = (query, key, value, planes, mask, sinks, length, scale, softcap, tolerance, unit_roundoff, min_context)
    return _attention(*call, counts=ReadCounts())


@library.impl(f"{ops.NAMESPACE}::aligned_read_attention.counted", "CompositeExplicitAutograd")
def aligned_read_attention_counted(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    planes: torch.Tensor | None,
    mask: torch.Tensor | None,
    sinks: torch.Tensor | None,
    length: int,
    scale: float,
    softcap: float,
    tolerance: float,
    unit_roundoff: float,
    min_context: int,
    counters: torch.Tensor,
    site: int,
) -> torch.Tensor:
    """The same, adding what was read to row ``site`` of ``counters``."""
    counts = ReadCounts()
    call = (query, key, value, planes, mask, sinks, length, scale, softcap, tolerance, unit_roundoff, min_context)
    output = _attention(*call, counts=counts)
    counts.add_to(counters, site)
    return output


@library.impl(f"{ops.NAMESPACE}::certified_read_attention", "CompositeExplicitAutograd")
def certified_read_attention(*arguments: Any) -> torch.Tensor:
    """See :data:`alignedkv_compile.ops.certified_read_attention`."""
    *call, bounds, site = arguments
    return _certified_attention(call, bounds[site], ReadCounts())


@library.impl(f"{ops.NAMESPACE}::certified_read_attention.counted", "CompositeExplicitAutograd")
def certified_read_attention_counted(*arguments: Any) -> torch.Tensor:
    """The same, adding what was read to row ``site`` of ``counters``."""
    *call, bounds, counters, site = arguments
    counts = ReadCounts()
    output = _certified_attention(call, bounds[site], counts)
    counts.add_to(counters, site)
    return output


def _certified_attention(call: Sequence[Any], bounds: torch.Tensor, counts: ReadCounts) -> torch.Tensor:
    """Certified reads, whose certificates go to one site's ``bounds`` (float32 ``[2, W]``): this call's, and the largest."""
    query_heads = call[0].shape[1]
    certificates = bounds.new_zeros(query_heads)
    output = _attention(*call, counts=counts, certificates=certificates)
    last, worst = bounds[:, :query_heads]
    last.copy_(certificates)
    torch.maximum(worst, certificates, out=worst)
    return output


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    planes: torch.Tensor | None,
    mask: torch.Tensor | None,
    sinks: torch.Tensor | None,
    length: int,
    scale: float,
    softcap: float,
    tolerance: float,
    unit_roundoff: float,
    min_context: int,
    *,
    counts: ReadCounts,
    certificates: torch.Tensor | None = None,
) -> torch.Tensor:
    """Every attention operator. With ``certificates``, float32 zeros ``[Hq]`` that are raised to this call's, each read is
    certified."""
    batch, query_heads, query_rows, _ = query.shape
    group, value_dim = query_heads // key.shape[1], value.shape[-1]
    aligned = planes is not None and tolerance > 0 and int(planes.narrow(0, 0, 8).view(torch.int64)) == PLANES_VALID
    views = arena_views(planes, arena_layout(key, value)) if planes is not None and aligned else None
    output = query.new_empty(batch, query_heads, query_rows, value_dim)
    for index, b, selected, call in head_calls(
        query, key, value, mask, sinks, length, scale, softcap, tolerance, unit_roundoff
    ):
        result = None
        if views is not None and call.span >= max(min_context, 1) and torch.isfinite(call.query).all():
            if certificates is None:
                result = read_aligned(call, views, index, counts)
            else:
                certified = read_certified(call, views, index, counts)
                result = None if certified is None else certified.output
                if certified is not None:
                    size = certified.output.norm(dim=-1) * unit_roundoff
                    relative = torch.where(size > 0, certified.bound / size, 0.0).view(group, query_rows).amax(1)
                    certificates[selected] = torch.maximum(certificates[selected], relative.to(certificates.dtype))
        if result is None:
            result = read_full(call, counts, torch.float32 if certificates is None else torch.float64)
        output[b, selected] = result.view(group, query_rows, value_dim).to(output.dtype)
    return output
