"""The aligned read of docs/policy.md for one KV head, in eager torch, in the phases of the generated C++ (``aligned_read.h``).

The GPU's order of steps is :mod:`alignedkv_compile.reference_scan`, the certified read :mod:`.reference_worst_case`.
"""

from __future__ import annotations

import math

import torch

from .arena import ArenaViews, unpack_row_order, unpack_scales
from .layout import (
    BLOCK_ROWS,
    CODE_RANGE,
    MID_STEP,
    NIBBLE_CENTER,
    SCALES_BYTES,
    SCORE_GROUP,
    ArenaLayout,
    padded_head_dim,
)
from .precision import LARGEST_SHIFT, SMALLEST_SUM, STREAM_FRACTION, evaluate, mid_ratios
from .reference_head import (
    HeadCall,
    ReadCounts,
    block_means,
    dequantize,
    dither,
    hadamard,
    key_nibbles,
    masked_scores,
    masked_softmax,
    norms_in_range,
    skipped_output,
    weight_error,
    with_sinks,
)
from .reference_query import Int8Query


def read_aligned(call: HeadCall, views: ArenaViews, head: int, counts: ReadCounts) -> torch.Tensor | None:
    """The output ``[M, Dv]`` of one KV head; None when everything is to be streamed: cheaper, or the choice was wrong."""
    read = AlignedRead(call, views, head, counts)
    read.score()
    if read.extreme:
        return None
    read.hi_values()
    read.choose_keys()
    if read.costs_too_much():
        return None
    read.refine_keys()
    if read.misjudged():
        return None
    read.exact_keys()
    read.correct_values()
    return read.combine()


class AlignedRead:
    """What the phases know, in the formulas' terms; ``[T]`` over the cache's rows, ``[M, T]`` with the query rows.

    Each phase is called once, in the order of :func:`read_aligned`.

    Attributes:
        live: bool ``[T]``: rows that any query row attends to.
        extreme: norms of V leave the range of squares: every bit must be read.
        kept: bool ``[T]``: rows of V that are read; block means answer for the others.
        refined, exact: bool ``[T]``: rows of K that are read at 8 bits and in full.
    """

    def __init__(self, call: HeadCall, views: ArenaViews, head: int, counts: ReadCounts) -> None:
        self.call, self.views, self.head, self.counts = call, views, head, counts
        self.length, self.key_dim, self.value_dim = call.key.shape[0], call.key.shape[-1], call.value.shape[-1]
        self.live = call.attended.any(0)
        self.live_rows = int(self.live.sum())
        self.offset = dither(torch.arange(self.length, device=call.key.device))
        self.key_scale, self.value_scale, value_norm = unpack_scales(views.scales[head, : self.length])
        self.value_norm = torch.where(self.live & torch.isfinite(value_norm), value_norm, 0.0)
        self.special_keys = self.live & ~torch.isfinite(self.key_scale)
        self.special_values = self.live & ~torch.isfinite(self.value_scale)
        self.finite_key = torch.where(torch.isfinite(self.key_scale) & self.live, self.key_scale, 0.0)
        self.finite_value = torch.where(torch.isfinite(self.value_scale) & self.live, self.value_scale, 0.0)
        self.mid_key, self.mid_value = mid_ratios(ArenaLayout(1, 1, self.key_dim, self.value_dim), call.key.element_size())
        self.plane_key, self.plane_value = (padded_head_dim(dim) // 2 for dim in (self.key_dim, self.value_dim))
        self.row_key, self.row_value = (dim * call.key.element_size() for dim in (self.key_dim, self.value_dim))
        self.row_bytes = self.live_rows * (self.row_key + self.row_value)
        self.skippable, self.means = block_means(call, views, head)
        positions = torch.arange(self.length, device=call.key.device)
        self.has_mid = views.has_mid(positions)
        self.mid_slots = torch.where(self.has_mid, views.mid_slots(positions), 0)
        self.has_whole = views.storage.residual or not views.storage.packed
        if views.storage.packed:  # what both planes leave out is read beside them
            self.row_key, self.row_value = self.row_key - self.key_dim, self.row_value - self.value_dim

    def score(self) -> None:
        """Phase 1: scores from the 4-bit plane, with the query as two int8 terms; weights and their statistics."""
        call = self.call
        mixed = hadamard(call.query)
        self.query = Int8Query.rounded(mixed)
        hi = key_nibbles(self.views, self.head)[: self.length, : self.key_dim].float()
        self.raw = self.query.hi_scores(hi, self.offset, self.key_scale, call.scale)
        if bool(self.special_keys.any()):
            self.raw[:, self.special_keys] = call.query @ call.key[self.special_keys].float().T * call.scale
        self.scores = masked_scores(call, self.raw)
        self.weights = masked_softmax(call, self.scores)
        self.norm = mixed.norm(dim=-1) * call.scale
        self.rms_value = float((self.value_norm.square().sum() / self.live_rows).sqrt())
        self.extreme = not norms_in_range(call, self.rms_value, self.weights)
        self.output_norm = (self.weights * self.value_norm).square().sum(-1).sqrt()

    def hi_values(self) -> None:
        """Phase 2: V rows above tau at 4 bits, block means for the rest: the output's norm."""
        call, weights = self.call, self.weights
        kept = ~self.skippable & self.live
        skip_errors = weights * self.value_norm.clamp_min(self.rms_value)
        for row in range(weights.shape[0]):
            _, allowed, first = self._limits(row)
            kept |= skip_errors[row] > evaluate(
                "skip_threshold",
                B=allowed,
                P_v=float(weights[row] @ self.value_norm),
                theta_4=first / self.mid_value,
                **self._common(),
            )
        self.kept = (kept & self.live) | self.special_values
        value_hi = unpack_row_order(self.views.value_hi[self.head, : self.length])[:, : self.value_dim]
        values = dequantize(value_hi, self.value_scale, self.offset)
        self.value_hi = torch.where(self.special_values[:, None], call.value.float(), values)
        at_4 = weights[:, self.kept] @ self.value_hi[self.kept] + skipped_output(weights, self.kept, self.means)
        at_4 = torch.where(torch.isfinite(at_4), at_4, 0.0)  # a NaN in V spoils its own element, not the thresholds
        self.output_norm = torch.maximum(self.output_norm, at_4.norm(dim=-1))
        blocks_used = _groups(self.skippable & ~self.kept, BLOCK_ROWS)
        groups_scored = _groups(self.live, SCORE_GROUP)
        self.counts.bytes_read += groups_scored * SCORE_GROUP * (self.plane_key + SCALES_BYTES)
        self.counts.bytes_read += blocks_used * (4 + 4 * self.value_dim) + int(self.kept.sum()) * self.plane_value
        self.counts.value_rows_hi += int(self.kept.sum())

    def choose_keys(self) -> None:
        """Phase 3: the output's norm gives theta; the K rows above it, and a prediction of what will be read."""
        weights = self.weights
        self.spread = (self.value_norm.square() + self.output_norm[:, None].square()).sqrt()
        self.value_4, self.value_8 = (evaluate("value_coefficient", b=bits, **self._common()) for bits in (4, 8))
        key_4, self.key_8 = (
            self._column([evaluate("key_coefficient", b=bits, q=q) for q in self.norm.tolist()]) for bits in (4, 8)
        )
        limits = zip(*map(self._limits, range(len(weights))), strict=True)
        self.addend_sums, self.budgets, self.thresholds = (list(numbers) for numbers in limits)
        theta = self._column(self.thresholds)
        self.key_errors = weights * self.spread * weight_error(self.finite_key * key_4)
        self.refined = (self.key_errors * self.mid_key > theta).any(0) & ~self.special_keys & self.has_mid
        value_addend = weights * self.finite_value
        self.predicted_bytes = evaluate(
            "predicted_bytes",
            rows_K8=int(self.refined.sum()),
            rows_K=int((self.refined & self._deserves_full_key(theta)).sum()),
            rows_V4=int(self.kept.sum()),
            rows_V8=int((self.kept & (value_addend * self.value_4 * self.mid_value > theta).any(0)).sum()),
            rows_V=int((self.kept & (value_addend * self.value_8 > theta).any(0)).sum()),
            row_K=self.row_key,
            row_V=self.row_value,
            plane_K=self.plane_key,
            plane_V=self.plane_value,
        )

    def costs_too_much(self) -> bool:
        """After phase 3: does reading everything cost less? A cache that has to be decoded is never read so."""
        return not self.views.storage.packed and self.predicted_bytes > float(STREAM_FRACTION) * self.row_bytes

    def refine_keys(self) -> None:
        """Phase 4: the mid plane of the chosen K rows, which adds to scores as they were before the cap."""
        call = self.call
        mid = unpack_row_order(self.views.key_mid[self.head, self.mid_slots])[:, : self.key_dim].float()
        finer = masked_scores(call, self.raw + self.query.mid_scores(mid, self.key_scale, call.scale))
        self.hi_scores, self.scores = self.scores, torch.where(self.refined, finer, self.scores)
        self.counts.bytes_read += int(self.refined.sum()) * self.plane_key
        self.counts.key_rows_mid += int(self.refined.sum())

    def misjudged(self) -> bool:
        """After phase 4: were the weights that chose the rows wrong?"""
        before, now = (with_sinks(self.call, scores).logsumexp(-1) for scores in (self.hi_scores, self.scores))
        return bool(((now - before).abs() > math.log(LARGEST_SHIFT)).any())

    def exact_keys(self) -> None:
        """Phase 5: what the rows left at 4 bits have spent lowers theta; K rows still above it are read in full."""
        call = self.call
        self.weights = masked_softmax(call, self.scores)
        for row in range(len(self.weights)):
            errors = self.key_errors[row]
            left = float(errors[errors * self.mid_key <= self.thresholds[row]].square().sum())
            remaining = evaluate("remaining_budget", B=self.budgets[row], left=left)
            self.thresholds[row] = evaluate("threshold", B=remaining, E=self.addend_sums[row], **self._common())
        self.exact = self.refined & self._deserves_full_key(self._column(self.thresholds))
        products = call.query @ torch.where(self.exact[:, None], call.key.float(), 0.0).T * call.scale
        self.scores = torch.where(self.exact, masked_scores(call, products), self.scores)
        self.weights = masked_softmax(call, self.scores)
        in_full = int((self.exact | self.special_keys).sum())
        self.counts.key_rows_full += in_full
        self.counts.bytes_read += in_full * self.row_key

    def correct_values(self) -> None:
        """Phase 6: V rows above theta among those kept, at 8 bits or in full."""
        theta, value_addend = self._column(self.thresholds), self.weights * self.finite_value
        mid_values = self.kept & (value_addend * self.value_4 * self.mid_value > theta).any(0) & ~self.special_values
        mid_values &= self.has_mid
        exact_values = mid_values & (value_addend * self.value_8 > theta).any(0) & self.has_whole
        nibbles = unpack_row_order(self.views.value_mid[self.head, self.mid_slots])[:, : self.value_dim].float()
        both = self.value_hi + (nibbles - NIBBLE_CENTER) * (self.value_scale[:, None] * (MID_STEP / CODE_RANGE))
        self.values = torch.where(mid_values[:, None], both, self.value_hi)
        self.values = torch.where(exact_values[:, None], self.call.value.float(), self.values)
        in_full = int((exact_values | self.special_values).sum())
        self.counts.value_rows_mid += int(mid_values.sum())
        self.counts.value_rows_full += in_full
        self.counts.bytes_read += int(mid_values.sum()) * self.plane_value + in_full * self.row_value

    def combine(self) -> torch.Tensor:
        """Phase 7: the sum, in which block means answer for the rows not read."""
        weights, kept, attended = self.weights, self.kept, self.call.attended
        self.counts.rows += self.live_rows
        self.counts.bytes_full += self.row_bytes
        if bool(self.special_values.any()):  # 0 * Inf must not reach query rows that are masked from the row
            read = torch.stack([w[kept & a] @ self.values[kept & a] for w, a in zip(weights, attended, strict=True)])
        else:
            read = weights[:, kept] @ self.values[kept]
        return read + skipped_output(weights, kept, self.means)

    def _limits(self, row: int) -> tuple[float, float, float]:
        """``E``, ``B`` and ``theta`` of a query row, from what is known of its output's norm."""
        weights, radius = self.weights[row], float(self.output_norm[row])
        addends = evaluate(
            "addend_sum",
            q=float(self.norm[row]),
            R=radius,
            P_sK=float(weights @ self.finite_key),
            P_sKv=float(weights @ (self.finite_key * self.value_norm)),
            P_sV=float(weights @ self.finite_value),
            **self._common(),
        )
        addends = max(addends, SMALLEST_SUM)
        allowed = evaluate("budget", R=radius, **self._common())
        return addends, allowed, evaluate("threshold", B=allowed, E=addends, **self._common())

    def _common(self) -> dict[str, float]:
        return {
            "alpha": self.call.tolerance,
            "u": self.call.unit_roundoff,
            "N": self.live_rows,
            "n": self.rms_value,
            "D": self.value_dim,
        }

    def _deserves_full_key(self, theta: torch.Tensor) -> torch.Tensor:
        """bool ``[T]``: rows of K whose addend at 8 bits is above ``theta [M, 1]``, where more bits are held."""
        return (self.weights * self.finite_key * self.spread * self.key_8 > theta).any(0) & self.has_whole

    def _column(self, numbers: list[float]) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.float32, device=self.call.key.device)[:, None]


def _groups(rows: torch.Tensor, size: int) -> int:
    """How many groups of ``size`` rows have one of ``rows [T]`` in them."""
    return int(torch.nn.functional.pad(rows, (0, -rows.shape[0] % size)).view(-1, size).any(-1).sum())
