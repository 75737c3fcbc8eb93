"""The meaning of the operators, in eager torch: readable first, and what runs outside Inductor.

The generated kernels make the same decisions from the same formulas (:mod:`alignedkv_compile.precision`); they differ from this
file only in the order of floating-point sums, so a row that sits on a threshold may fall on either side of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import library

from . import ops
from .arena import (
    ArenaViews,
    arena_views,
    pack_row_order,
    pack_scales,
    pack_score_order,
    rounded_scale,
    unpack_row_order,
    unpack_scales,
)
from .layout import (
    BLOCK_ROWS,
    CODE_RANGE,
    HEADROOM,
    HI_STEP,
    MID_STEP,
    NIBBLE_CENTER,
    PLANES_VALID,
    SCALES_BYTES,
    SCORE_GROUP,
    ArenaLayout,
    arena_layout,
    padded_head_dim,
    score_ordered,
)
from .precision import LARGEST_SHIFT, SMALLEST_SUM, STREAM_FRACTION, evaluate, mid_ratios
from .reference_head import (
    HeadCall,
    ReadCounts,
    block_means,
    dequantize,
    dither,
    hadamard,
    head_calls,
    key_nibbles,
    masked_scores,
    masked_softmax,
    norms_in_range,
    read_full,
    skipped_output,
    weight_error,
    with_sinks,
)
from .reference_query import Int8Query
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
                result = _read_aligned(call, views, index, counts)
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


def _read_aligned(call: HeadCall, views: ArenaViews, head: int, counts: ReadCounts) -> torch.Tensor | None:
    """The read policy of docs/policy.md for one KV head; None when streaming everything is cheaper."""
    length, key_dim, value_dim = call.key.shape[0], call.key.shape[-1], call.value.shape[-1]
    live = call.attended.any(0)
    live_rows = int(live.sum())
    positions = torch.arange(length, device=call.key.device)
    offset = dither(positions)
    key_scale, value_scale, value_norm = unpack_scales(views.scales[head, :length])
    value_norm = torch.where(live & torch.isfinite(value_norm), value_norm, 0.0)
    special_keys = live & ~torch.isfinite(key_scale)
    special_values = live & ~torch.isfinite(value_scale)

    # 1. scores from the 4-bit plane, with the query as two int8 terms
    mixed = hadamard(call.query)
    query = Int8Query.rounded(mixed)
    hi = key_nibbles(views, head)[:length, :key_dim].float()
    raw = query.hi_scores(hi, offset, key_scale, call.scale)
    if bool(special_keys.any()):
        raw[:, special_keys] = call.query @ call.key[special_keys].float().T * call.scale
    scores = masked_scores(call, raw)
    weights = masked_softmax(call, scores)

    # statistics of the weights, and which V rows a block mean may answer for
    norm = mixed.norm(dim=-1) * call.scale
    rms_value = float((value_norm.square().sum() / live_rows).sqrt())
    if not norms_in_range(call, rms_value, weights):
        return None
    output_norm = (weights * value_norm).square().sum(-1).sqrt()
    finite_key = torch.where(torch.isfinite(key_scale) & live, key_scale, 0.0)
    finite_value = torch.where(torch.isfinite(value_scale) & live, value_scale, 0.0)
    skippable, means = block_means(call, views, head)
    kept = ~skippable & live
    common = {
        "alpha": call.tolerance,
        "u": call.unit_roundoff,
        "N": live_rows,
        "n": rms_value,
        "D": value_dim,
    }
    mid_key, mid_value = mid_ratios(ArenaLayout(1, 1, key_dim, value_dim), call.key.element_size())

    def threshold(row: int) -> tuple[float, float, float]:
        """``E``, ``B`` and ``theta`` of a query row, from what is known of its output's norm."""
        addends = evaluate(
            "addend_sum",
            q=float(norm[row]),
            R=float(output_norm[row]),
            P_sK=float(weights[row] @ finite_key),
            P_sKv=float(weights[row] @ (finite_key * value_norm)),
            P_sV=float(weights[row] @ finite_value),
            **common,
        )
        addends = max(addends, SMALLEST_SUM)
        allowed = evaluate("budget", R=float(output_norm[row]), **common)
        return addends, allowed, evaluate("threshold", B=allowed, E=addends, **common)

    skip_errors = weights * value_norm.clamp_min(rms_value)
    for row in range(weights.shape[0]):
        _, allowed, first = threshold(row)
        kept |= skip_errors[row] > evaluate(
            "skip_threshold", B=allowed, P_v=float(weights[row] @ value_norm), theta_4=first / mid_value, **common
        )
    kept = (kept & live) | special_values

    # 2. those V rows at 4 bits give the output's norm, hence the threshold of every addend
    value_hi = dequantize(unpack_row_order(views.value_hi[head, :length])[:, :value_dim], value_scale, offset)
    value_hi = torch.where(special_values[:, None], call.value.float(), value_hi)
    at_4 = weights[:, kept] @ value_hi[kept] + skipped_output(weights, kept, means)
    at_4 = torch.where(torch.isfinite(at_4), at_4, 0.0)  # a NaN in V spoils its own element, not the thresholds
    output_norm = torch.maximum(output_norm, at_4.norm(dim=-1))
    spread = (value_norm.square() + output_norm[:, None].square()).sqrt()
    value_4, value_8 = (evaluate("value_coefficient", b=bits, **common) for bits in (4, 8))
    key_4, key_8 = ([evaluate("key_coefficient", b=bits, q=q) for q in norm.tolist()] for bits in (4, 8))
    addend_sums, budgets, thresholds = (list(numbers) for numbers in zip(*map(threshold, range(len(weights))), strict=True))

    def column(numbers: list[float]) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.float32, device=call.key.device)[:, None]

    key_addend, value_addend = weights * finite_key * spread, weights * finite_value
    theta = column(thresholds)
    plane_key, plane_value = padded_head_dim(key_dim) // 2, padded_head_dim(value_dim) // 2
    row_key, row_value = (dimension * call.key.element_size() for dimension in (key_dim, value_dim))
    key_errors = weights * spread * weight_error(finite_key * column(key_4))
    refined = (key_errors * mid_key > theta).any(0) & ~special_keys
    full_guess = refined & (key_addend * column(key_8) > theta).any(0)
    predicted = evaluate(
        "predicted_bytes",
        rows_K8=int(refined.sum()),
        rows_K=int(full_guess.sum()),
        rows_V4=int(kept.sum()),
        rows_V8=int((kept & (value_addend * value_4 * mid_value > theta).any(0)).sum()),
        rows_V=int((kept & (value_addend * value_8 > theta).any(0)).sum()),
        row_K=row_key,
        row_V=row_value,
        plane_K=plane_key,
        plane_V=plane_value,
    )
    full = live_rows * (row_key + row_value)
    groups = int(torch.nn.functional.pad(live, (0, -length % SCORE_GROUP)).view(-1, SCORE_GROUP).any(-1).sum())
    blocks_used = int(torch.nn.functional.pad(skippable & ~kept, (0, -length % BLOCK_ROWS)).view(-1, BLOCK_ROWS).any(-1).sum())
    counts.bytes_read += groups * SCORE_GROUP * (plane_key + SCALES_BYTES) + blocks_used * (4 + 4 * value_dim)
    counts.bytes_read += int(kept.sum()) * plane_value
    counts.value_rows_hi += int(kept.sum())
    if predicted > float(STREAM_FRACTION) * full:
        return None

    # 3. K rows above the threshold: the mid plane, which adds to scores as they were before the cap, then the row itself
    mid = unpack_row_order(views.key_mid[head, :length])[:, :key_dim].float()
    counts.bytes_read += int(refined.sum()) * plane_key
    counts.key_rows_mid += int(refined.sum())
    finer = masked_scores(call, raw + query.mid_scores(mid, key_scale, call.scale))
    hi_scores, scores = scores, torch.where(refined, finer, scores)
    shift = (with_sinks(call, scores).logsumexp(-1) - with_sinks(call, hi_scores).logsumexp(-1)).abs()
    if bool((shift > math.log(LARGEST_SHIFT)).any()):
        return None
    weights = masked_softmax(call, scores)
    for row in range(weights.shape[0]):
        errors = key_errors[row]
        remaining = evaluate(
            "remaining_budget", B=budgets[row], left=float(errors[errors * mid_key <= thresholds[row]].square().sum())
        )
        thresholds[row] = evaluate("threshold", B=remaining, E=addend_sums[row], **common)
    theta = column(thresholds)
    key_addend, value_addend = weights * finite_key * spread, weights * finite_value
    exact_keys = refined & (key_addend * column(key_8) > theta).any(0)
    exact = call.query @ torch.where(exact_keys[:, None], call.key.float(), 0.0).T * call.scale
    scores = torch.where(exact_keys, masked_scores(call, exact), scores)
    weights = masked_softmax(call, scores)

    # 4. V rows likewise, among those kept in 2
    value_addend = weights * finite_value
    mid_values = kept & (value_addend * value_4 * mid_value > theta).any(0) & ~special_values
    exact_values = mid_values & (value_addend * value_8 > theta).any(0)
    both = value_hi + (unpack_row_order(views.value_mid[head, :length])[:, :value_dim].float() - NIBBLE_CENTER) * (
        value_scale[:, None] * (MID_STEP / CODE_RANGE)
    )
    values = torch.where(mid_values[:, None], both, value_hi)
    values = torch.where(exact_values[:, None], call.value.float(), values)

    # 5. the sum, in which block means answer for the rows not read
    result = weights[:, kept] @ values[kept] + skipped_output(weights, kept, means)
    if bool(special_values.any()):  # 0 * Inf must not reach query rows that are masked from the row
        attended = call.attended
        result = torch.stack([w[kept & a] @ values[kept & a] for w, a in zip(weights, attended, strict=True)])
        result += skipped_output(weights, kept, means)

    counts.rows += live_rows
    counts.bytes_full += full
    counts.key_rows_full += int((exact_keys | special_keys).sum())
    counts.value_rows_mid += int(mid_values.sum())
    counts.value_rows_full += int((exact_values | special_values).sum())
    counts.bytes_read += int((exact_keys | special_keys).sum()) * row_key
    counts.bytes_read += int(mid_values.sum()) * plane_value
    counts.bytes_read += int((exact_values | special_values).sum()) * row_value
    return result
