"""The certified read of one KV head: bits are left out only while a bound that holds for every input stays within the budget.

The bound is :data:`.worst_case.certificate`, computed in float64 from what was read in the end, so it does not depend on how
the rows were chosen. Rows are chosen by the same principle as in :mod:`.reference`, with linear sums in place of sums of
squares.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import sympy
import torch

from .arena import ArenaViews, unpack_row_order, unpack_scales
from .layout import BLOCK_ROWS, CODE_RANGE, HI_STEP, MID_STEP, NIBBLE_CENTER, SCALES_BYTES, SCORE_GROUP, padded_head_dim
from .precision import NORM_RANGE, STREAM_FRACTION, TERM_RATIO
from .reference_head import (
    HeadCall,
    ReadCounts,
    block_means,
    dither,
    hadamard,
    key_nibbles,
    masked_scores,
    masked_softmax,
    skipped_output,
)
from .reference_query import Int8Query
from .worst_case import (
    FINEST_BUDGET,
    LADDER,
    LARGEST_SCORE_BOUND,
    REFINEMENTS,
    SHARES,
    SMALLEST_SCALE,
    WORST_CASE,
    query_slack,
)


@dataclass(frozen=True)
class CertifiedRead:
    """What a certified read of one KV head gives.

    Attributes:
        output: float64 ``[M, Dv]``.
        bound: float64 ``[M]``: the norm of ``output``'s error against exact attention on the stored numbers is at most this.
    """

    output: torch.Tensor
    bound: torch.Tensor


def read_certified(call: HeadCall, views: ArenaViews, head: int, counts: ReadCounts) -> CertifiedRead | None:
    """Read one KV head with ``bound <= tolerance * unit_roundoff * ||output||`` for every query row.

    Returns None, with the bytes read so far counted, when that takes more than reading everything, or a number is not finite.
    """
    fine = call.tolerance * call.unit_roundoff < FINEST_BUDGET
    rows = None if fine else _Rows.load(call, views, head)
    if rows is None:
        return None
    weights = masked_softmax(call, rows.scores)
    means = block_means(call, views, head)
    kept = rows.choose_kept(weights, means)
    size = rows.hi_output_norm(weights, kept, means[1])
    keys = rows.refine_keys(weights, size, kept)
    if not keys.within:
        _count(rows, keys, kept, rows.bits(4), means[0], counts)
        return None
    weights = masked_softmax(call, rows.scores)
    value_bits = rows.choose_value_bits(weights, kept, size)
    output = weights[:, kept] @ rows.values(value_bits)[kept] + skipped_output(weights, kept, means[1].double())
    bound = rows.certify(weights, output, keys.bits, kept, value_bits, means[1])
    allowed = _formula("worst_case_budget")(alpha=call.tolerance, u=call.unit_roundoff, R=output.norm(dim=-1))
    _count(rows, keys, kept, value_bits, means[0], counts)
    if not bool((bound <= allowed).all()):
        return None
    counts.bytes_full += rows.live * (call.key.shape[-1] + call.value.shape[-1]) * call.key.element_size()
    counts.rows += rows.live
    return CertifiedRead(output, bound)


@dataclass(frozen=True)
class _Keys:
    """How K was read: bits of every row, int64 ``[T]``; whose mid plane was read, bool ``[T]``; whether that was enough."""

    bits: torch.Tensor
    mid: torch.Tensor
    within: bool


@dataclass
class _Rows:
    """The rows of one KV head as a certified read sees them, float64; ``scores [M, T]`` change while K is refined."""

    call: HeadCall
    views: ArenaViews
    head: int
    live_rows: torch.Tensor
    query_norm1: torch.Tensor
    query_lost1: torch.Tensor
    query_second1: torch.Tensor
    query: torch.Tensor
    first_term: torch.Tensor
    key_scale: torch.Tensor
    value_scale: torch.Tensor
    value_norm: torch.Tensor
    raw: torch.Tensor
    scores: torch.Tensor

    @classmethod
    def load(cls, call: HeadCall, views: ArenaViews, head: int) -> _Rows | None:
        """Scores from the 4-bit plane, and from all bits of raw rows; None when a scale, a norm or the query is not finite or
        out of range."""
        length, key_dim = call.key.shape[0], call.key.shape[-1]
        live = call.attended.any(0)
        key_scale, value_scale, value_norm = (x.double() for x in unpack_scales(views.scales[head, :length]))
        raw = live & ~torch.isfinite(key_scale) & views.storage.residual
        if not bool(torch.isfinite(call.key[raw].double().sum() + call.value[raw].double().sum())):
            return None
        key_scale, value_scale = (torch.where(raw, 0.0, scale) for scale in (key_scale, value_scale))
        value_norm = torch.where(raw, torch.where(raw[:, None], call.value, 0.0).double().norm(dim=-1), value_norm)
        if not bool(torch.isfinite(torch.stack([key_scale, value_scale, value_norm])[:, live]).all()):
            return None
        scales = torch.stack([key_scale, value_scale])[:, live]
        if bool(((scales > 0) & (scales < SMALLEST_SCALE)).any()):
            return None
        key_scale, value_scale, value_norm = (torch.where(live, x, 0.0) for x in (key_scale, value_scale, value_norm))
        rms = float((value_norm.square().sum() / live.sum()).sqrt())
        if not NORM_RANGE[0] <= rms <= NORM_RANGE[1]:
            return None
        mixed = hadamard(call.query)
        query = Int8Query.rounded(mixed)
        first, second = (term.double() * query.step.double() / TERM_RATIO**place for place, term in enumerate(query.terms))
        coded = first + second
        lost = (mixed.double() - coded).abs().sum(-1) + query_slack(key_dim) * mixed.double().norm(dim=-1)
        hi = (
            key_nibbles(views, head)[:length, :key_dim].double()
            - NIBBLE_CENTER
            - dither(torch.arange(length, device=call.key.device)).double()[:, None]
        )
        dots = coded @ (hi * (key_scale[:, None] * (HI_STEP / CODE_RANGE))).T * call.scale
        return cls(
            call=call,
            views=views,
            head=head,
            live_rows=live,
            query_norm1=coded.abs().sum(-1) * abs(call.scale),
            query_lost1=lost * abs(call.scale),
            query_second1=second.abs().sum(-1) * abs(call.scale),
            query=coded,
            first_term=first,
            key_scale=key_scale,
            value_scale=value_scale,
            value_norm=value_norm,
            raw=raw,
            scores=masked_scores(call, torch.where(raw, _exact_dots(call, raw), dots)),
        )

    def bits(self, number: int) -> torch.Tensor:
        """This many bits of every row, int64 ``[T]``; all of raw ones."""
        return torch.where(self.raw, 16, number)

    @property
    def live(self) -> int:
        return int(self.live_rows.sum())

    @property
    def score_groups(self) -> int:
        padding = -len(self.live_rows) % SCORE_GROUP
        return int(torch.nn.functional.pad(self.live_rows, (0, padding)).view(-1, SCORE_GROUP).any(-1).sum())

    def budget(self, share: str, size: torch.Tensor) -> torch.Tensor:
        """A share of the budget for outputs of norm ``size [M]``."""
        return SHARES[share] * _formula("worst_case_budget")(alpha=self.call.tolerance, u=self.call.unit_roundoff, R=size)

    def score_bound(self, bits: torch.Tensor) -> torch.Tensor:
        """``d [M, T]`` of rows read at 4, 8 or 16 bits; 0 at 16, and where a query row does not attend; infinite above
        :data:`.worst_case.LARGEST_SCORE_BOUND`."""
        sums = {"q_1": self.query_norm1, "r_1": self.query_lost1, "l_1": self.query_second1}
        arguments = {"s_K": self.key_scale, **{name: norms[:, None] for name, norms in sums.items()}}
        dimension = float(self.call.key.shape[-1])
        at_4, at_8 = (_formula("score_bound")(b=b, D_K=dimension, **arguments) for b in (4.0, 8.0))
        d = torch.where(bits == 4, at_4, torch.where(bits == 8, at_8, 0.0))
        return torch.where(self.call.attended, torch.where(d > LARGEST_SCORE_BOUND, torch.inf, d), 0.0)

    def choose_kept(self, weights: torch.Tensor, means: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Rows of V that are read: those whose replacement by a block's mean would cost too much, and those without a mean."""
        skippable, vectors = means
        mean_norm = vectors.double().norm(dim=-1).repeat_interleave(BLOCK_ROWS)[: len(skippable)]
        cost = weights * _formula("skipped_value_bound")(v=self.value_norm, m=mean_norm)
        size = (weights * self.value_norm).square().sum(-1).sqrt()
        above = cost > linear_threshold(cost, skippable, self.budget("skip", size), self.live)[:, None]
        return (above.any(0) | ~skippable | self.raw) & self.live_rows

    def hi_output_norm(self, weights: torch.Tensor, kept: torch.Tensor, means: torch.Tensor) -> torch.Tensor:
        """Norm of the output ``[M]`` from the 4-bit plane of V."""
        bits = self.bits(4)
        at_4 = weights[:, kept] @ self.values(bits)[kept] + skipped_output(weights, kept, means.double())
        return at_4.norm(dim=-1)

    def refine_keys(self, weights: torch.Tensor, size: torch.Tensor, kept: torch.Tensor) -> _Keys:
        """Refine the scores, unless everything would be read anyway."""
        bits = self.bits(4)
        mid = torch.zeros_like(self.live_rows)
        value_bytes = self.value_bytes(self.choose_value_bits(weights, kept, size), kept)
        top = self.scores.amax(-1, keepdim=True)
        for _ in range(REFINEMENTS):
            cost = self.key_cost(weights, bits, size)
            if bool((cost.sum(-1) <= self.budget("accepted_key", size)).all()):
                break
            allowed = self.budget("key", size)
            finer = self.key_cost(weights, torch.where(bits == 4, 8, 16), size)
            theta = linear_threshold(cost, self.live_rows, allowed, self.live, finer)[:, None]
            refined = (cost > theta).any(0)
            whole = refined & ((finer > theta).any(0) | (bits == 8))
            chosen = torch.where(whole | self.raw, 16, torch.where(refined & (bits == 4), 8, bits))
            read = mid | (chosen == 8)
            if self.costs_too_much(chosen, read, value_bytes):
                return _Keys(bits, mid, within=False)
            bits, mid = chosen, read
            self.refine_scores(bits)
            if bool((self.scores - top > LARGEST_SCORE_BOUND).any()):
                return _Keys(bits, mid, within=False)
            weights = masked_softmax(self.call, self.scores)
        return _Keys(bits, mid, within=True)

    def costs_too_much(self, bits: torch.Tensor, mid: torch.Tensor, value_bytes: int) -> bool:
        """Whether what is left to be read comes near to reading everything."""
        key, value = self.call.key, self.call.value
        ahead = int(mid.sum()) * (padded_head_dim(key.shape[-1]) // 2)
        ahead += int((bits == 16).sum()) * key.shape[-1] * key.element_size()
        return ahead + value_bytes > float(STREAM_FRACTION) * self.live * (key.shape[-1] + value.shape[-1]) * key.element_size()

    def value_bytes(self, bits: torch.Tensor, kept: torch.Tensor) -> int:
        """What V rows at ``bits`` take beyond their 4-bit plane."""
        value = self.call.value
        mid, full = (int((kept & (bits == number)).sum()) for number in (8, 16))
        return mid * (padded_head_dim(value.shape[-1]) // 2) + full * value.shape[-1] * value.element_size()

    def key_cost(self, weights: torch.Tensor, bits: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
        """What the rows of K add to the certificate at ``bits``, ``[M, T]``."""
        grown = _formula("growth")(d=self.score_bound(bits))
        cost = _formula("key_addend")(p=weights, g=grown, v=self.value_norm, R=size[:, None])
        return torch.nan_to_num(cost, nan=torch.inf, posinf=torch.inf)  # an infinite bound on a weight that underflows

    def refine_scores(self, bits: torch.Tensor) -> None:
        """Scores of rows at 8 and 16 bits."""
        call, key_dim = self.call, self.call.key.shape[-1]
        length = len(bits)
        hi = key_nibbles(self.views, self.head)[:length, :key_dim].double() - NIBBLE_CENTER
        hi -= dither(torch.arange(length, device=self.key_scale.device)).double()[:, None]
        mid = unpack_row_order(self.views.key_mid[self.head, :length])[:, :key_dim].double() - NIBBLE_CENTER
        unit = self.key_scale[:, None] / CODE_RANGE
        dots = self.query @ (hi * (HI_STEP * unit)).T + self.first_term @ (mid * (MID_STEP * unit)).T
        at_8 = masked_scores(call, dots * call.scale)
        at_16 = masked_scores(call, _exact_dots(call, bits == 16))
        self.scores = torch.where(bits == 16, at_16, torch.where(bits == 8, at_8, self.scores))

    def choose_value_bits(self, weights: torch.Tensor, kept: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
        """Bits of every V row that is read, int64 ``[T]``."""
        at_4, at_8 = (weights * self.value_bound(torch.full(kept.shape, bits, device=kept.device)) for bits in (4, 8))
        theta = linear_threshold(at_4, kept, self.budget("value", size), self.live, finer=at_8)[:, None]
        return torch.where((at_8 > theta).any(0) | self.raw, 16, torch.where((at_4 > theta).any(0), 8, 4))

    def value_bound(self, bits: torch.Tensor) -> torch.Tensor:
        """Bound on the norm of every V row's error ``[T]``."""
        dimension = float(self.call.value.shape[-1])
        at_4, at_8 = (_formula("value_bound")(b=b, D=dimension, s_V=self.value_scale) for b in (4.0, 8.0))
        return torch.where(bits == 4, at_4, torch.where(bits == 8, at_8, 0.0))

    def values(self, bits: torch.Tensor) -> torch.Tensor:
        """V rows at their bits, float64 ``[T, Dv]``."""
        length, dimension = self.call.value.shape
        hi = unpack_row_order(self.views.value_hi[self.head, :length])[:, :dimension].double() - NIBBLE_CENTER
        hi -= dither(torch.arange(length, device=self.key_scale.device)).double()[:, None]
        mid = unpack_row_order(self.views.value_mid[self.head, :length])[:, :dimension].double() - NIBBLE_CENTER
        step = self.value_scale[:, None] / CODE_RANGE
        planes = (hi * HI_STEP + torch.where((bits == 4)[:, None], 0.0, mid * MID_STEP)) * step
        return torch.where((bits == 16)[:, None], self.call.value.double(), planes)

    def certify(
        self,
        weights: torch.Tensor,
        output: torch.Tensor,
        bits: torch.Tensor,
        kept: torch.Tensor,
        value_bits: torch.Tensor,
        means: torch.Tensor,
    ) -> torch.Tensor:
        """The certificate of what was read, ``[M]``."""
        mean_norm = means.double().norm(dim=-1).repeat_interleave(BLOCK_ROWS)
        mean_norm = torch.nn.functional.pad(mean_norm, (0, max(len(kept) - len(mean_norm), 0)))[: len(kept)]
        replaced = _formula("skipped_value_bound")(v=self.value_norm, m=mean_norm)
        value_errors = weights @ torch.where(kept, self.value_bound(value_bits), replaced)
        d = self.score_bound(bits)
        moved = _formula("weight_error_bound")(p=weights, g=_formula("growth")(d=d))
        least = _formula("weight_least")(p=weights, d=d).sum(-1)
        if self.call.sinks is not None:
            least = least + (1 - weights.sum(-1))  # a row of no error, and of zeros
        return _formula("certificate")(
            V=value_errors,
            W=moved.sum(-1),
            W_v=moved @ self.value_norm,
            A=torch.where(least > 0, least, 1.0),  # fully masked query rows have no weights and no error
            R=output.norm(dim=-1),
        )


def _exact_dots(call: HeadCall, rows: torch.Tensor) -> torch.Tensor:
    """Scaled products ``[M, T]`` with these rows of K as they are; zeros elsewhere."""
    return call.query.double() @ torch.where(rows[:, None], call.key.double(), 0.0).T * call.scale


def linear_threshold(
    cost: torch.Tensor, rows: torch.Tensor, allowed: torch.Tensor, most: int, finer: torch.Tensor | None = None
) -> torch.Tensor:
    """Largest of the limit, its half, its quarter and so on for which the rows that are left with ``cost <= theta [M]`` cost at
    most ``allowed`` in all; ``allowed / most`` when none of the :data:`.worst_case.LADDER` is small enough.

    Args:
        cost: ``[M, T]``, not negative.
        rows: bool ``[T]``, the rows that count.
        allowed: ``[M]``.
        most: at least the number of ``rows``.
        finer: ``[M, T]``: what a row costs after one refinement. Rows above the threshold then count with it, if it lies below.
    """
    found = allowed / max(most, 1)
    after = torch.zeros_like(cost) if finer is None else finer
    for step in reversed(range(LADDER)):
        theta = (allowed * 2.0**-step)[:, None]
        left = torch.where(cost <= theta, cost, torch.where(after <= theta, after, 0.0))
        found = torch.where(left[:, rows].sum(-1) <= allowed, theta[:, 0], found)
    return found


def _count(
    rows: _Rows, keys: _Keys, kept: torch.Tensor, value_bits: torch.Tensor, skippable: torch.Tensor, counts: ReadCounts
) -> None:
    """Add the bytes and rows that the read takes."""
    key, value = rows.call.key, rows.call.value
    plane_key, plane_value = padded_head_dim(key.shape[-1]) // 2, padded_head_dim(value.shape[-1]) // 2
    skipped = torch.nn.functional.pad(skippable & ~kept, (0, -len(kept) % BLOCK_ROWS)).view(-1, BLOCK_ROWS).any(-1)
    whole_keys, whole_values = keys.bits == 16, kept & (value_bits == 16)
    mid_keys, mid_values = keys.mid, kept & (value_bits == 8)
    residual = rows.views.storage.residual
    if residual:  # a row is decoded from both planes and what these leave out
        mid_keys, mid_values = mid_keys | whole_keys, mid_values | whole_values
    key_mid, key_full, value_full = int(mid_keys.sum()), int(whole_keys.sum()), int(whole_values.sum())
    value_hi, value_mid = int(kept.sum()), int(mid_values.sum())
    beyond = key.element_size() - residual
    read = rows.score_groups * SCORE_GROUP * (plane_key + SCALES_BYTES) + int(skipped.sum()) * (4 + 4 * value.shape[-1])
    read += key_mid * plane_key + key_full * key.shape[-1] * beyond
    counts.bytes_read += read + (value_hi + value_mid) * plane_value + value_full * value.shape[-1] * beyond
    counts.key_rows_mid += key_mid
    counts.key_rows_full += key_full
    counts.value_rows_hi += value_hi
    counts.value_rows_mid += value_mid
    counts.value_rows_full += value_full


@functools.cache
def _formula(name: str) -> Callable[..., torch.Tensor]:
    """A formula of :data:`.worst_case.WORST_CASE` over float64 tensors, its symbols as keywords."""
    expression = WORST_CASE[name]
    symbols = sorted(expression.free_symbols, key=str)
    function = sympy.lambdify(symbols, expression, [{"exp": torch.exp, "log": math.log, "sqrt": math.sqrt}, "math"])
    names = [str(symbol) for symbol in symbols]

    def formula(**values: torch.Tensor | float) -> torch.Tensor:
        result: torch.Tensor = function(*(values[name] for name in names))
        return result

    return formula
