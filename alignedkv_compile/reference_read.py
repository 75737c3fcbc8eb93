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
from .precision import LARGEST_NORM_RATIO, LARGEST_SHIFT, SMALLEST_SUM, STREAM_FRACTION, evaluate, mid_ratios
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
    for attempt in range(2):
        if not read.choose_rows() or read.costs_too_much():
            return None
        read.refine_keys()
        if read.misjudged():
            return None
        if read.radius_shrinks() and not attempt:
            continue
        read.exact_keys()
        read.read_values()
        output = read.combine()
        if output is not None:
            return output
    return None


class AlignedRead:
    """What the phases know, in the formulas' terms; ``[T]`` over the cache's rows, ``[M, T]`` with the query rows.

    Phases are called in the order of :func:`read_aligned`.

    Attributes:
        live: bool ``[T]``: rows that any query row attends to.
        radius, largest: float32 ``[M]``: ``R``, and what it is no more than, as far as known.
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
        self.packed = views.storage.packed
        self.has_whole = views.storage.residual or not self.packed
        if self.packed:  # what both planes leave out is read beside them
            self.row_key, self.row_value = self.row_key - self.key_dim, self.row_value - self.value_dim
        self.value_4, self.value_8 = (evaluate("value_coefficient", b=bits, D=self.value_dim) for bits in (4, 8))

    def score(self) -> None:
        """Phase 1: scores from the 4-bit plane, with the query as two int8 terms; weights, and how far V points one way."""
        call = self.call
        mixed = hadamard(call.query)
        self.query = Int8Query.rounded(mixed)
        hi = key_nibbles(self.views, self.head)[: self.length, : self.key_dim].float()
        self.raw = self.query.hi_scores(hi, self.offset, self.key_scale, call.scale)
        if bool(self.special_keys.any()):
            self.raw[:, self.special_keys] = call.query @ call.key[self.special_keys].float().T * call.scale
        self.hi_scores = masked_scores(call, self.raw)
        self.hi_weights = masked_softmax(call, self.hi_scores)
        self.norm = mixed.norm(dim=-1) * abs(call.scale)
        self.rms_value = float((self.value_norm.square().sum() / self.live_rows).sqrt())
        weighted = self.hi_weights * self.value_norm
        blocks = self.means.shape[0]
        mass = torch.nn.functional.pad(weighted * self.skippable, (0, blocks * BLOCK_ROWS - self.length))
        along = (mass.view(-1, blocks, BLOCK_ROWS).sum(-1) @ self.means).norm(dim=-1) / self.rms_value
        self.coherence = torch.where(torch.isfinite(along), along, 0.0)
        self.largest = torch.full_like(self.coherence, math.inf)
        groups_scored = _groups(self.live, SCORE_GROUP)
        blocks_read = int(self.skippable.sum()) // BLOCK_ROWS
        self.counts.bytes_read += groups_scored * SCORE_GROUP * (self.plane_key + SCALES_BYTES)
        self.counts.bytes_read += blocks_read * (4 + 4 * self.value_dim)
        self.counts.key_rows_full += int(self.special_keys.sum())
        self.counts.bytes_read += int(self.special_keys.sum()) * self.row_key

    def choose_rows(self) -> bool:
        """Phases 2 and 3: what every addend is held to, and the rows that deserve to be read. False where norms of V leave the
        range of squares: every bit must be read."""
        weights = self.hi_weights
        if not norms_in_range(self.call, self.rms_value, weights):
            return False
        alone = torch.minimum(self._radius(weights), self.largest)
        self.radius = torch.minimum(self._radius(weights, self.coherence), self.largest)
        limits = zip(*(self._limits(row, float(norm)) for row, norm in enumerate(self.radius)), strict=True)
        self.addend_sums, self.budgets, self.thresholds = (list(numbers) for numbers in limits)
        theta = self._column(self.thresholds)
        tau = self._column([self._skip_threshold(row, float(norm)) for row, norm in enumerate(alone)])
        self.spread = (self.value_norm.square() + self.radius[:, None].square()).sqrt()
        key_4, self.key_8 = (
            self._column([evaluate("key_coefficient", b=bits, q=q) for q in self.norm.tolist()]) for bits in (4, 8)
        )
        errors = weights * self.spread * weight_error(self.finite_key * key_4)
        self.refined = self.live & (errors * self.mid_key > theta).any(0) & self.has_mid
        chosen = (weights * self.value_norm.clamp_min(self.rms_value) > tau).any(0)
        self.kept = self.live & (self.refined | ~self.skippable | self.special_values | chosen)
        self.left = errors[:, ~self.refined].square().sum(-1).tolist()
        value_addend = weights * self.finite_value
        self.predicted_bytes = evaluate(
            "predicted_bytes",
            rows_K8=int(self.refined.sum()),
            rows_K=int((self.refined & self._deserves_full_key(weights, theta)).sum()),
            rows_V4=int(self.kept.sum()),
            rows_V8=int((self.kept & (value_addend * self.value_4 * self.mid_value > theta).any(0)).sum()),
            rows_V=int((self.kept & (value_addend * self.value_8 > theta).any(0)).sum()),
            row_K=self.row_key,
            row_V=self.row_value,
            plane_K=self.plane_key,
            plane_V=self.plane_value,
        )
        return True

    def costs_too_much(self) -> bool:
        """After phase 3: does reading everything cost less? A cache that has to be decoded is never read so."""
        return not self.packed and self.predicted_bytes > float(STREAM_FRACTION) * self.row_bytes

    def refine_keys(self) -> None:
        """Phase 4: the mid plane of the chosen K rows, which adds to scores as they were before the cap. What the others have
        spent lowers theta."""
        call = self.call
        mid = unpack_row_order(self.views.key_mid[self.head, self.mid_slots])[:, : self.key_dim].float()
        finer = masked_scores(call, self.raw + self.query.mid_scores(mid, self.key_scale, call.scale))
        self.scores = torch.where(self.refined, finer, self.hi_scores)
        self.weights = masked_softmax(call, self.scores)
        for row, left in enumerate(self.left):
            remaining = evaluate("remaining_budget", B=self.budgets[row], left=left)
            self.thresholds[row] = evaluate("threshold", B=remaining, E=self.addend_sums[row], **self._common())
        self.counts.bytes_read += int(self.refined.sum()) * self.plane_key
        self.counts.key_rows_mid += int(self.refined.sum())

    def misjudged(self) -> bool:
        """After phase 4: were the weights that chose the rows wrong?"""
        before, now = (with_sinks(self.call, scores).logsumexp(-1) for scores in (self.hi_scores, self.scores))
        self.shrunk = (before - now).exp()
        return bool(((now - before).abs() > math.log(LARGEST_SHIFT)).any())

    def radius_shrinks(self) -> bool:
        """After phase 4: is ``R``, by the better weights, less than half of what chose the rows?"""
        return self._shrinks_to(self._radius(self.weights, self.coherence * self.shrunk))

    def _shrinks_to(self, found: torch.Tensor) -> bool:
        self.largest = torch.fmin(self.largest, found)
        return bool((found * LARGEST_NORM_RATIO < self.radius).any())

    def exact_keys(self) -> None:
        """Phase 5: K rows still above theta are read in full."""
        call = self.call
        self.exact = self.refined & self._deserves_full_key(self.weights, self._column(self.thresholds))
        products = call.query @ torch.where(self.exact[:, None], call.key.float(), 0.0).T * call.scale
        self.scores = torch.where(self.exact, masked_scores(call, products), self.scores)
        self.weights = masked_softmax(call, self.scores)
        self.counts.key_rows_full += int(self.exact.sum())
        self.counts.bytes_read += int(self.exact.sum()) * self.row_key

    def read_values(self) -> None:
        """Phase 6: the V rows kept, at 4 bits, 8, or in full."""
        theta, value_addend = self._column(self.thresholds), self.weights * self.finite_value
        mid = self.kept & (value_addend * self.value_4 * self.mid_value > theta).any(0) & self.has_mid & ~self.special_values
        whole = mid & (value_addend * self.value_8 > theta).any(0) & self.has_whole
        value_hi = unpack_row_order(self.views.value_hi[self.head, : self.length])[:, : self.value_dim]
        values = dequantize(value_hi, self.value_scale, self.offset)
        nibbles = unpack_row_order(self.views.value_mid[self.head, self.mid_slots])[:, : self.value_dim].float()
        both = values + (nibbles - NIBBLE_CENTER) * (self.value_scale[:, None] * (MID_STEP / CODE_RANGE))
        values = torch.where(mid[:, None], both, values)
        whole |= self.special_values
        self.values = torch.where(whole[:, None], self.call.value.float(), values)
        kept, in_full, at_8 = int(self.kept.sum()), int(whole.sum()), int((mid | whole).sum())
        self.counts.value_rows_hi += kept
        self.counts.value_rows_mid += at_8
        self.counts.value_rows_full += in_full
        in_planes = kept + at_8 - (0 if self.packed else 2 * in_full)
        self.counts.bytes_read += in_planes * self.plane_value + in_full * self.row_value

    def combine(self) -> torch.Tensor | None:
        """Phase 7: the sum, in which block means answer for rows not read; None where it is less than half of ``R`` long."""
        weights, kept, attended = self.weights, self.kept, self.call.attended
        if bool(self.special_values.any()):  # 0 * Inf must not reach query rows that are masked from the row
            read = torch.stack([w[kept & a] @ self.values[kept & a] for w, a in zip(weights, attended, strict=True)])
        else:
            read = weights[:, kept] @ self.values[kept]
        output = read + skipped_output(weights, kept, self.means)
        norm = output.norm(dim=-1)
        if self._shrinks_to(torch.where(torch.isfinite(norm), norm, math.inf)):
            return None
        self.counts.rows += self.live_rows
        self.counts.bytes_full += self.row_bytes
        return output

    def _radius(self, weights: torch.Tensor, coherence: torch.Tensor | None = None) -> torch.Tensor:
        """``R [M]`` as far as ``weights`` tell: if rows of V were independent, or pointed where their blocks' means do."""
        alone = (weights * self.value_norm).square().sum(-1).sqrt()
        return alone if coherence is None else torch.maximum(alone, coherence)

    def _limits(self, row: int, radius: float) -> tuple[float, float, float]:
        """``E``, ``B`` and ``theta`` of a query row, for ``R``."""
        weights = self.hi_weights[row]
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

    def _skip_threshold(self, row: int, radius: float) -> float:
        """``tau`` of a query row, for ``R``."""
        _, allowed, theta = self._limits(row, radius)
        weighted = float(self.hi_weights[row] @ self.value_norm)
        return evaluate("skip_threshold", B=allowed, P_v=weighted, theta_4=theta / self.mid_value, **self._common())

    def _common(self) -> dict[str, float]:
        return {
            "alpha": self.call.tolerance,
            "u": self.call.unit_roundoff,
            "N": self.live_rows,
            "n": self.rms_value,
            "D": self.value_dim,
        }

    def _deserves_full_key(self, weights: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
        """bool ``[T]``: rows of K whose addend at 8 bits is above ``theta [M, 1]``, where more bits are held."""
        return (weights * self.finite_key * self.spread * self.key_8 > theta).any(0) & self.has_whole

    def _column(self, numbers: list[float]) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.float32, device=self.call.key.device)[:, None]


def _groups(rows: torch.Tensor, size: int) -> int:
    """How many groups of ``size`` rows have one of ``rows [T]`` in them."""
    return int(torch.nn.functional.pad(rows, (0, -rows.shape[0] % size)).view(-1, size).any(-1).sum())
