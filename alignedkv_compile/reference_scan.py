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
    output = Finish(call, views, head, rows, share, splits, scores, limits, counts).run()
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


class Finish:
    """``finish`` of one pair, all programs at once, in the steps of ``finish.py.jinja``; :meth:`run` is their order.

    Attributes:
        theta: float32 ``[M, 1]``, then ``[M, T]``: each program takes what K at 4 bits has spent in its share for the pair's.
        refined, kept, alone: bool ``[T]``: rows of K that are read at 8 bits, rows of V that are read, rows that are streamed.
    """

    def __init__(
        self,
        call: HeadCall,
        views: ArenaViews,
        head: int,
        rows: Rows,
        share: torch.Tensor,
        splits: int,
        scores: torch.Tensor,
        limits: Limits,
        counts: ScanCounts,
    ) -> None:
        self.call, self.views, self.head, self.rows = call, views, head, rows
        self.share, self.splits, self.scores, self.limits, self.counts = share, splits, scores, limits, counts
        self.length, self.key_dim, self.value_dim = call.key.shape[0], call.key.shape[-1], call.value.shape[-1]
        self.plane_key, self.plane_value = views.key_mid.shape[-1], views.value_mid.shape[-1]
        self.row_key, self.row_value = (dim * call.key.element_size() for dim in (self.key_dim, self.value_dim))
        self.refinement = self.plane_key * (2 if call.softcap > 0 else 1)
        self.mid_key, self.mid_value = mid_ratios(ArenaLayout(1, 1, self.key_dim, self.value_dim), call.key.element_size())
        self.value_8 = evaluate("value_coefficient", b=8, D=self.value_dim)
        self.theta, self.key_4 = limits.theta[:, None], limits.key_4[:, None]
        self.spread = (rows.norm.square() + limits.radius[:, None].square()).sqrt()

    def run(self) -> torch.Tensor | None:
        """The output ``[M, Dv]``; None where it turns out that the limits were wrong."""
        self.choose_rows()
        self.stream_shares()
        self.lower_theta()
        self.skip_rows()
        self.refine_keys()
        self.exact_keys()
        self.correct_values()
        output = self.combine()
        return None if self.misjudged(output) else output

    def choose_rows(self) -> None:
        """The rows of K and V that the limits ask for."""
        rows, weights = self.rows, self._weights()
        self.errors = weights * self.spread * weight_error(rows.key_scale * self.key_4)
        self.refined = (self.errors * self.mid_key > self.theta).any(0) & rows.live
        skip_errors = weights * rows.norm.clamp_min(self.limits.rms)
        chosen = (skip_errors > self.limits.tau[:, None]).any(0)
        self.kept = rows.live & (self.refined | ~rows.skippable | chosen)
        self.counts.candidates += int(self.kept.sum())

    def stream_shares(self) -> None:
        """Programs whose rows are nearly all of their share, or more, stream it."""
        rows, weights = self.rows, self._weights()
        value_errors = weights * rows.value_scale * self.value_8
        full_key = self.refined & self._deserves_full_key(weights)
        predicted = self.refined * self.refinement + full_key * self.row_key + self.kept * self.plane_value
        mid = (value_errors * PLANE_RATIO * self.mid_value > self.theta).any(0)
        predicted = predicted + (self.kept & mid) * self.plane_value
        predicted = predicted + (self.kept & (value_errors > self.theta).any(0)) * self.row_value
        self.alone = torch.zeros_like(rows.live)
        for program in range(self.splits):
            own = (self.share == program) & rows.live
            if float(predicted[own].sum()) > float(STREAM_FRACTION) * int(own.sum()) * (self.row_key + self.row_value):
                self.counts.shares_streamed += 1
                self.alone |= own

    def lower_theta(self) -> None:
        """What rows of K left at 4 bits have spent of the budget, each program for all."""
        spent = torch.where(self.rows.live & ~self.refined, self.errors, 0.0).square().nan_to_num(0.0)
        programs = range(self.splits)
        thetas = [self.limits.after(spent[:, self.share == program].sum(-1) * self.splits) for program in programs]
        self.theta = torch.stack(thetas)[self.share].T

    def skip_rows(self) -> None:
        """Block means for the rows that are not read."""
        skipped = (self._weights() * ~(self.kept | self.alone) * self.rows.live).nan_to_num(0.0)
        blocks = self.rows.means.shape[0]
        padded = torch.nn.functional.pad(skipped, (0, blocks * BLOCK_ROWS - self.length))
        self.mass = padded.view(-1, blocks, BLOCK_ROWS).sum(-1)
        self.refined, self.kept = self.refined & ~self.alone, self.kept & ~self.alone
        self.counts.bytes_read += int((self.mass > 0).any(0).sum()) * (4 + 4 * self.value_dim)

    def refine_keys(self) -> None:
        """Four more bits of K."""
        call, rows = self.call, self.rows
        mid = unpack_row_order(self.views.key_mid[self.head, : self.length])[:, : self.key_dim].float()
        query = Int8Query.rounded(hadamard(call.query))
        mid_scores = query.mid_scores(mid, rows.key_scale, call.scale, terms=2)
        if call.softcap > 0:  # what is added belongs under the cap: those rows' 4-bit plane is read again
            finer = masked_scores(call, _hi_scores(call, self.views, self.head, rows) + mid_scores) * math.log2(math.e)
        else:
            finer = self.scores + mid_scores * math.log2(math.e)
        self.scores = torch.where(self.refined, finer, self.scores)
        self.counts.bytes_read += int(self.refined.sum()) * self.refinement
        self.counts.key_rows_mid += int(self.refined.sum())

    def exact_keys(self) -> None:
        """The rows of K that deserve all their bits, and those that are streamed."""
        call = self.call
        whole = self.alone | (self.refined & self._deserves_full_key(self._weights()))
        keys = torch.where(whole[:, None], call.key.float(), 0.0)
        products = masked_scores(call, call.query @ keys.T * call.scale) * math.log2(math.e)
        self.scores = torch.where(whole, products, self.scores)
        self.counts.key_rows_full += int(whole.sum())
        self.counts.bytes_read += int(whole.sum()) * self.row_key

    def correct_values(self) -> None:
        """Rows of V at 4 bits, at 8, or in full."""
        rows, value_scale = self.rows, self.rows.value_scale
        value_errors = self._weights() * value_scale * self.value_8
        full = self.kept & (value_errors > self.theta).any(0)
        finer = self.kept & ~full & (value_errors * PLANE_RATIO * self.mid_value > self.theta).any(0)
        hi, mid = (
            unpack_row_order(plane[self.head, : self.length])[:, : self.value_dim]
            for plane in (self.views.value_hi, self.views.value_mid)
        )
        values = dequantize(hi, value_scale, rows.offset)
        both = values + (mid.float() - NIBBLE_CENTER) * (value_scale[:, None] * (MID_STEP / CODE_RANGE))
        values = torch.where(finer[:, None], both, values)
        self.values = torch.where((full | self.alone)[:, None], self.call.value.float(), values)
        whole = int((full | self.alone).sum())
        self.counts.value_rows_hi += int(self.kept.sum())
        self.counts.value_rows_mid += int((finer | full).sum())
        self.counts.value_rows_full += whole
        self.counts.bytes_read += (int((self.kept & ~full).sum()) + int(finer.sum())) * self.plane_value
        self.counts.bytes_read += whole * self.row_value

    def combine(self) -> torch.Tensor:
        """The weighted sum, in which block means answer for the rows not read."""
        call, weights, used = self.call, self._weights(), self.kept | self.alone
        total = weights[:, used].sum(-1) + self.mass.sum(-1)
        if call.sinks is not None:
            sinks = call.sinks * math.log2(math.e) - self.limits.log2_total
            total = total + torch.where(call.sinks == -math.inf, 0.0, torch.exp2(sinks))
        self.total = total
        live_rows = int(self.rows.live.sum())
        self.counts.rows += live_rows
        self.counts.bytes_full += live_rows * (self.row_key + self.row_value)
        output = weights[:, used] @ self.values[used] + self.mass @ self.rows.means
        return output * torch.where(total > 0, 1 / total, 0.0)[:, None]

    def misjudged(self, output: torch.Tensor) -> bool:
        """Have the bits that were read shown the limits wrong?"""
        norm, radius = output.norm(dim=-1), self.limits.radius
        ratio = torch.where(norm > 0, radius / norm, 0.0)
        self.counts.largest_norm_ratio = max(self.counts.largest_norm_ratio, float(ratio.max()))
        wrong = (self.total.log2().abs() > math.log2(LARGEST_SHIFT)) | (norm * LARGEST_NORM_RATIO < radius)
        return bool((wrong & (radius > 0) & torch.isfinite(norm)).any())

    def _weights(self) -> torch.Tensor:
        """float32 ``[M, T]`` over the pair's total at 4 bits."""
        return torch.where(self.scores == -math.inf, 0.0, torch.exp2(self.scores - self.limits.log2_total[:, None]))

    def _deserves_full_key(self, weights: torch.Tensor) -> torch.Tensor:
        """bool ``[T]``: rows of K whose addend at 8 bits, a sixteenth of that at 4, is above theta."""
        addends: torch.Tensor = weights * self.spread * self.rows.key_scale * self.key_4
        return (addends > 16 * self.theta).any(0)
