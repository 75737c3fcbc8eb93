"""The read in the order of steps of a GPU, in eager torch: what ``scan`` and ``finish`` compute (docs/gpu.md).

It differs from :mod:`alignedkv_compile.reference` in when things are known, not in what they are held to. Every threshold
follows from one pass over the 4-bit plane of K: ``R``, which the other order takes from 4-bit rows of V, is estimated from the
means of V over blocks. The estimate is checked against the output.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from . import ops
from .arena import ArenaViews, arena_views, unpack_row_order, unpack_scales
from .layout import (
    BLOCK_ROWS,
    CODE_RANGE,
    MID_STEP,
    NIBBLE_CENTER,
    PLANE_RATIO,
    PLANES_VALID,
    SCALES_BYTES,
    ArenaLayout,
    arena_layout,
)
from .precision import (
    LARGEST_NORM_RATIO,
    LARGEST_SHIFT,
    LARGEST_STEP,
    SMALLEST_SUM,
    SMALLEST_TOP,
    STEPS,
    STREAM_FRACTION,
    evaluate,
    mid_ratios,
)
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
    norms_in_range,
    read_full,
    weight_error,
    with_sinks,
)
from .reference_query import Int8Query


@dataclass
class ScanCounts(ReadCounts):
    """What was read, and how often this order of steps had to give up.

    Attributes:
        pairs: (batch, KV head) pairs read.
        pairs_unread: streamed because their planes say too little: stale, special numbers, short spans.
        shares_streamed: programs that streamed their share because its read would save nothing.
        pairs_misjudged: streamed because what was read has shown the limits wrong.
        candidates: rows listed for more than the 4-bit plane of K.
        largest_norm_ratio: of the estimate of ``R`` to the output's norm.
    """

    pairs: int = 0
    pairs_unread: int = 0
    shares_streamed: int = 0
    pairs_misjudged: int = 0
    candidates: int = 0
    largest_norm_ratio: float = 0.0


@dataclass(frozen=True)
class Limits:
    """What a pair's addends are held to; float32 ``[M]`` each, but for ``rms``."""

    log2_total: torch.Tensor
    radius: torch.Tensor
    theta: torch.Tensor
    tau: torch.Tensor
    key_4: torch.Tensor
    budget: torch.Tensor
    addends: torch.Tensor
    rms: float
    live_rows: int

    def after(self, left: torch.Tensor) -> torch.Tensor:
        """``theta`` once ``left`` (a sum of squares per query row) of the budget is spent."""
        rows = zip(self.budget.tolist(), self.addends.tolist(), left.tolist(), strict=True)
        return torch.tensor(
            [
                evaluate("threshold", B=evaluate("remaining_budget", B=allowed, left=spent), E=addends, N=self.live_rows)
                for allowed, addends, spent in rows
            ],
            device=left.device,
        )


@dataclass(frozen=True)
class Rows:
    """One pair's planes as numbers, over its ``T`` rows, and which of them may be answered for by a block's mean."""

    key_scale: torch.Tensor
    value_scale: torch.Tensor
    norm: torch.Tensor
    offset: torch.Tensor
    live: torch.Tensor
    skippable: torch.Tensor
    means: torch.Tensor

    @classmethod
    def of(cls, call: HeadCall, views: ArenaViews, head: int) -> Rows:
        length = call.key.shape[0]
        key_scale, value_scale, norm = unpack_scales(views.scales[head, :length])
        skippable, means = block_means(call, views, head)
        offset = dither(torch.arange(length, device=call.key.device))
        return cls(key_scale, value_scale, norm, offset, call.attended.any(0), skippable, means)


def read_scanned(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    planes: torch.Tensor,
    mask: torch.Tensor | None,
    sinks: torch.Tensor | None,
    length: int,
    scale: float,
    softcap: float,
    tolerance: float,
    unit_roundoff: float,
    min_context: int,
    *,
    splits: int = 1,
    counts: ScanCounts | None = None,
) -> torch.Tensor:
    """``aligned_read_attention`` in this order of steps.

    Args:
        splits: programs among which the blocks of a pair are dealt out.
        counts: what was read is added here.
    """
    counts = ScanCounts() if counts is None else counts
    batch, query_heads, query_rows, _ = query.shape
    group, value_dim = query_heads // key.shape[1], value.shape[-1]
    valid = int(planes.narrow(0, 0, 8).view(torch.int64)) == PLANES_VALID
    views = arena_views(planes, arena_layout(key, value))
    output = query.new_empty(batch, query_heads, query_rows, value_dim)
    for index, b, selected, call in head_calls(
        query, key, value, mask, sinks, length, scale, softcap, tolerance, unit_roundoff
    ):
        counts.pairs += 1
        lenient = call.bias is not None and mask is not None and _absorbed(call.bias, call.attended, mask.dtype)
        usable = valid and tolerance > 0 and call.span >= max(min_context, 1) and bool(torch.isfinite(call.query).all())
        result = _read_pair(call, views, index, counts, splits, lenient=lenient) if usable else None
        if result is None:
            counts.pairs_unread += 1
            result = read_full(call, counts)
        output[b, selected] = result.view(group, query_rows, value_dim).to(output.dtype)
    return output


def _absorbed(bias: torch.Tensor, attended: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether a query row attends only to rows whose bias is a prohibition, which absorbs scores."""
    return bool(((bias <= ops.mask_floor(dtype)) & attended).any())


def _read_pair(
    call: HeadCall, views: ArenaViews, head: int, counts: ScanCounts, splits: int, *, lenient: bool
) -> torch.Tensor | None:
    """One pair; None where its planes say too little."""
    rows = Rows.of(call, views, head)
    share = torch.arange(call.key.shape[0], device=call.key.device) // BLOCK_ROWS % splits
    plane_key = views.key_mid.shape[-1]
    record = 4 + 4 * call.value.shape[-1]
    counts.bytes_read += int(rows.live.sum()) * (plane_key + SCALES_BYTES) + int(rows.skippable.sum()) // BLOCK_ROWS * record
    if lenient or not bool(torch.isfinite(rows.key_scale + rows.value_scale)[rows.live].all()):
        return None
    scores = _scan(call, views, head, rows, share, splits)
    limits = _limits(call, rows, scores)
    if limits is None:
        return None
    output = _finish(call, views, head, rows, share, splits, scores, limits, counts)
    if output is None:
        counts.pairs_misjudged += 1
        again = ReadCounts()
        output = read_full(call, again)
        counts.bytes_read += again.bytes_read
        counts.key_rows_full += again.rows
        counts.value_rows_full += again.rows
    return output


def _hi_scores(call: HeadCall, views: ArenaViews, head: int, rows: Rows) -> torch.Tensor:
    """Scaled products ``[M, T]`` from the 4-bit plane."""
    hi = key_nibbles(views, head)[: call.key.shape[0], : call.key.shape[-1]].float()
    return Int8Query.rounded(hadamard(call.query)).hi_scores(hi, rows.offset, rows.key_scale, call.scale)


def _scan(call: HeadCall, views: ArenaViews, head: int, rows: Rows, share: torch.Tensor, splits: int) -> torch.Tensor:
    """Scores ``[M, T]`` as powers of two, as they are stored: relative to a reference of each program."""
    scores = masked_scores(call, _hi_scores(call, views, head, rows)) * math.log2(math.e)
    for program in range(splits):
        own = (share == program) & rows.live
        if not bool(own.any()):
            continue
        first = int(own.nonzero()[0]) // BLOCK_ROWS
        block = scores[:, first * BLOCK_ROWS : (first + 1) * BLOCK_ROWS]
        reference = block.amax(-1, keepdim=True)
        reference = torch.where(torch.isfinite(reference), reference, 0.0)
        top = (scores[:, own] - reference).amax(-1, keepdim=True)
        off = (top > LARGEST_STEP / STEPS) | ((top < SMALLEST_TOP) & (top > -math.inf))
        relative = scores[:, own] - (reference := torch.where(off, reference + top, reference))
        steps = torch.round(relative * STEPS).clamp_min(-LARGEST_STEP)
        scores[:, own] = torch.where(relative == -math.inf, relative, steps / STEPS + reference)
    return scores


def _limits(call: HeadCall, rows: Rows, scores: torch.Tensor) -> Limits | None:
    """What the sums over all rows say; None where norms of V leave the range of squares."""
    value_dim, live_rows = call.value.shape[-1], int(rows.live.sum())
    norm, key_scale, value_scale = (torch.where(rows.live, of, 0.0) for of in (rows.norm, rows.key_scale, rows.value_scale))
    rms = float((norm.square().sum() / live_rows).sqrt())
    log2_total = with_sinks(call, scores.mul(math.log(2))).logsumexp(-1) / math.log(2)
    weights = torch.where(scores == -math.inf, 0.0, torch.exp2(scores - log2_total[:, None]))
    if not norms_in_range(call, rms, weights):
        return None
    weighted = weights * norm
    blocks = rows.means.shape[0]
    mass = torch.nn.functional.pad(weighted * rows.skippable, (0, blocks * BLOCK_ROWS - norm.shape[0]))
    coherent = (mass.view(-1, blocks, BLOCK_ROWS).sum(-1) @ rows.means).norm(dim=-1) / rms
    radius = torch.maximum(weighted.square().sum(-1).sqrt(), torch.where(torch.isfinite(coherent), coherent, 0.0))
    query_norm = hadamard(call.query).norm(dim=-1) * abs(call.scale)
    _, mid_value = mid_ratios(ArenaLayout(1, 1, call.key.shape[-1], value_dim), call.key.element_size())
    common = {"alpha": call.tolerance, "u": call.unit_roundoff, "N": live_rows, "n": rms, "D": value_dim}
    theta, tau, key_4, budgets, addends = [], [], [], [], []
    for row, q in enumerate(query_norm.tolist()):
        found = {
            **common,
            "q": q,
            "R": float(radius[row]),
            "P_v": float(weighted[row].sum()),
            "P_sK": float(weights[row] @ key_scale),
            "P_sKv": float(weighted[row] @ key_scale),
            "P_sV": float(weights[row] @ value_scale),
        }
        allowed = evaluate("budget", **found)
        budgets.append(allowed)
        addends.append(max(evaluate("addend_sum", **found), SMALLEST_SUM))
        theta.append(evaluate("threshold", B=allowed, E=addends[-1], **common))
        tau.append(evaluate("skip_threshold", B=allowed, theta_4=theta[-1] / mid_value, **found))
        key_4.append(evaluate("key_coefficient", b=4, q=q))
    columns = (torch.tensor(one, device=norm.device) for one in (theta, tau, key_4, budgets, addends))
    return Limits(log2_total, radius, *columns, rms=rms, live_rows=live_rows)  # type: ignore[misc, arg-type]


def _finish(
    call: HeadCall,
    views: ArenaViews,
    head: int,
    rows: Rows,
    share: torch.Tensor,
    splits: int,
    scores: torch.Tensor,
    limits: Limits,
    counts: ScanCounts,
) -> torch.Tensor | None:
    """The rows that the limits ask for, and the sum; None where it turns out that the limits were wrong."""
    length, key_dim, value_dim = call.key.shape[0], call.key.shape[-1], call.value.shape[-1]
    plane_key, plane_value = views.key_mid.shape[-1], views.value_mid.shape[-1]
    row_key, row_value = (dim * call.key.element_size() for dim in (key_dim, value_dim))
    mid_key, mid_value = mid_ratios(ArenaLayout(1, 1, key_dim, value_dim), call.key.element_size())
    value_8 = evaluate("value_coefficient", b=8, D=value_dim)
    theta, key_4 = limits.theta[:, None], limits.key_4[:, None]
    weights = torch.exp2(scores - limits.log2_total[:, None])

    # 1. the rows to be read, and block means for the others
    spread = (rows.norm.square() + limits.radius[:, None].square()).sqrt()
    errors = weights * spread * weight_error(rows.key_scale * key_4)
    refined = (errors * mid_key > theta).any(0) & rows.live
    skip_errors = weights * rows.norm.clamp_min(limits.rms)
    kept = rows.live & (refined | ~rows.skippable | (skip_errors > limits.tau[:, None]).any(0))
    value_errors = weights * rows.value_scale * value_8
    full_key = refined & (weights * spread * rows.key_scale * key_4 > 16 * theta).any(0)
    refinement = plane_key * (2 if call.softcap > 0 else 1)
    predicted = refined * refinement + full_key * row_key + kept * plane_value
    predicted = predicted + (kept & (value_errors * PLANE_RATIO * mid_value > theta).any(0)) * plane_value
    predicted = predicted + (kept & (value_errors > theta).any(0)) * row_value
    alone = torch.zeros_like(rows.live)
    for program in range(splits):
        own = (share == program) & rows.live
        if float(predicted[own].sum()) > float(STREAM_FRACTION) * int(own.sum()) * (row_key + row_value):
            counts.shares_streamed += 1
            alone |= own
    counts.candidates += int(kept.sum())
    blocks = rows.means.shape[0]
    skipped = (weights * ~(kept | alone) * rows.live).nan_to_num(0.0)
    mass = torch.nn.functional.pad(skipped, (0, blocks * BLOCK_ROWS - length)).view(-1, blocks, BLOCK_ROWS).sum(-1)
    counts.bytes_read += int((mass > 0).any(0).sum()) * (4 + 4 * value_dim)

    # what rows of K left at 4 bits have spent of the budget, each program for all
    spent = torch.where(rows.live & ~refined, errors, 0.0).square().nan_to_num(0.0)
    theta = torch.stack([limits.after(spent[:, share == program].sum(-1) * splits) for program in range(splits)])[share].T
    refined, kept = refined & ~alone, kept & ~alone

    # 2. four more bits of K; 3. the rows of K that deserve all
    mid = unpack_row_order(views.key_mid[head, :length])[:, :key_dim].float()
    query = Int8Query.rounded(hadamard(call.query))
    mid_scores = query.mid_scores(mid, rows.key_scale, call.scale, terms=2)
    if call.softcap > 0:  # what is added belongs under the cap: those rows' 4-bit plane is read again
        finer = masked_scores(call, _hi_scores(call, views, head, rows) + mid_scores) * math.log2(math.e)
    else:
        finer = scores + mid_scores * math.log2(math.e)
    scores = torch.where(refined, finer, scores)
    weights = torch.exp2(scores - limits.log2_total[:, None])
    exact = refined & (weights * spread * rows.key_scale * key_4 > 16 * theta).any(0)
    whole = exact | alone
    keys = torch.where(whole[:, None], call.key.float(), 0.0)
    scores = torch.where(whole, masked_scores(call, call.query @ keys.T * call.scale) * math.log2(math.e), scores)
    weights = torch.where(scores == -math.inf, 0.0, torch.exp2(scores - limits.log2_total[:, None]))

    # 4. rows of V
    value_errors = weights * rows.value_scale * value_8
    full = kept & (value_errors > theta).any(0)
    finer = kept & ~full & (value_errors * PLANE_RATIO * mid_value > theta).any(0)
    values = dequantize(unpack_row_order(views.value_hi[head, :length])[:, :value_dim], rows.value_scale, rows.offset)
    nibbles = unpack_row_order(views.value_mid[head, :length])[:, :value_dim].float()
    values = torch.where(
        finer[:, None], values + (nibbles - NIBBLE_CENTER) * (rows.value_scale[:, None] * (MID_STEP / CODE_RANGE)), values
    )
    values = torch.where((full | alone)[:, None], call.value.float(), values)
    used = kept | alone
    total = weights[:, used].sum(-1) + mass.sum(-1)
    if call.sinks is not None:
        sinks = call.sinks * math.log2(math.e) - limits.log2_total
        total = total + torch.where(call.sinks == -math.inf, 0.0, torch.exp2(sinks))
    output = weights[:, used] @ values[used] + mass @ rows.means
    output = output * torch.where(total > 0, 1 / total, 0.0)[:, None]

    streamed = int(alone.sum())
    counts.rows += int(rows.live.sum())
    counts.bytes_full += int(rows.live.sum()) * (row_key + row_value)
    counts.bytes_read += (
        int(refined.sum()) * refinement + int((kept & ~full).sum()) * plane_value + int(finer.sum()) * plane_value
    )
    counts.bytes_read += (int(exact.sum()) + streamed) * row_key + (int(full.sum()) + streamed) * row_value
    counts.key_rows_mid += int(refined.sum())
    counts.key_rows_full += int(exact.sum()) + streamed
    counts.value_rows_hi += int(kept.sum())
    counts.value_rows_mid += int((finer | full).sum())
    counts.value_rows_full += int(full.sum()) + streamed

    # 5. have the bits that were read shown the limits wrong?
    norm = output.norm(dim=-1)
    ratio = torch.where(norm > 0, limits.radius / norm, 0.0)
    counts.largest_norm_ratio = max(counts.largest_norm_ratio, float(ratio.max()))
    misjudged = (total.log2().abs() > math.log2(LARGEST_SHIFT)) | (norm * LARGEST_NORM_RATIO < limits.radius)
    return None if bool((misjudged & (limits.radius > 0) & torch.isfinite(norm)).any()) else output
