"""What both reads of the reference share: one KV head's part of a call, its softmax, its planes as numbers, and its counts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import sympy
import torch

from . import ops
from .arena import ArenaViews, unpack_row_order, unpack_score_order
from .layout import (
    BLOCK_ROWS,
    CODE_RANGE,
    DITHER_MULTIPLIER,
    DITHER_UNIT,
    HI_STEP,
    NIBBLE_CENTER,
    hadamard_blocks,
    score_ordered,
)
from .precision import EXPRESSIONS, NORM_RANGE


def dither(positions: torch.Tensor) -> torch.Tensor:
    """Row dither in steps of the 4-bit plane, float32 in [-1/2, 1/2), from int64 row numbers."""
    word = (positions * DITHER_MULTIPLIER) & 0xFFFFFFFF
    return (word - (1 << 31)).to(torch.float32) * DITHER_UNIT


def hadamard(rows: torch.Tensor) -> torch.Tensor:
    """Orthonormal block Hadamard transform of the last dimension, float32; its own inverse."""
    blocks = rows.float().split(hadamard_blocks(rows.shape[-1]), -1)
    return torch.cat([butterflies(block) * block.shape[-1] ** -0.5 for block in blocks], -1)


def butterflies(block: torch.Tensor) -> torch.Tensor:
    """Hadamard transform of the last dimension, a power of two, without its norm; exact for integers."""
    size, half = block.shape[-1], 1
    while half < size:
        pairs = block.reshape(*block.shape[:-1], size // (2 * half), 2, half)
        low, high = pairs[..., 0, :], pairs[..., 1, :]
        block = torch.stack([low + high, low - high], -2).reshape(block.shape)
        half *= 2
    return block


@dataclass
class ReadCounts:
    """Rows and bytes that one operator call has read, summed over batch and KV heads."""

    bytes_read: float = 0
    bytes_full: float = 0
    rows: int = 0
    key_rows_mid: int = 0
    key_rows_full: int = 0
    value_rows_hi: int = 0
    value_rows_mid: int = 0
    value_rows_full: int = 0

    def add_to(self, counters: torch.Tensor, site: int) -> None:
        fields = [1, *(int(getattr(self, name)) for name in ops.COUNTER_FIELDS[1:])]
        counters[site] += torch.tensor(fields, dtype=torch.int64, device=counters.device)


@dataclass(frozen=True)
class HeadCall:
    """One KV head's part of a call: ``M`` query rows of its group over ``T`` cache rows.

    ``bias`` is float32 ``[M, T]`` or None; ``attended`` bool ``[M, T]``; ``sinks`` float32 ``[M]`` or None; all bits of a row
    are ``stored_row`` bytes.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    bias: torch.Tensor | None
    attended: torch.Tensor
    sinks: torch.Tensor | None
    scale: float
    softcap: float
    tolerance: float
    unit_roundoff: float
    stored_row: int

    @property
    def span(self) -> int:
        """Rows from the first to the last that a query row attends to."""
        live = self.attended.any(0).nonzero()
        return int(live[-1] - live[0]) + 1 if len(live) else 0


def head_calls(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    sinks: torch.Tensor | None,
    length: int,
    scale: float,
    softcap: float,
    tolerance: float,
    unit_roundoff: float,
    stored_row: int | None = None,
) -> Iterator[tuple[int, int, slice, HeadCall]]:
    """Parts of an operator's call: index of the (batch, KV head) pair, batch entry, its group's query heads, and it.

    Args:
        stored_row: bytes that all bits of a row are held in; those of its numbers if not given.
    """
    if stored_row is None:
        stored_row = (key.shape[-1] + value.shape[-1]) * key.element_size()
    query_rows, heads = query.shape[2], key.shape[1]
    group = query.shape[1] // heads
    for index in range(query.shape[0] * heads):
        b, h = divmod(index, heads)
        selected = slice(h * group, (h + 1) * group)
        bias, attended = group_bias(mask, b, selected, group, query_rows, length, query.device)
        yield (
            index,
            b,
            selected,
            HeadCall(
                query=query[b, selected].reshape(group * query_rows, -1).float(),
                key=key[b, h, :length],
                value=value[b, h, :length],
                bias=bias,
                attended=attended,
                sinks=None if sinks is None else sinks[selected].float().repeat_interleave(query_rows),
                scale=scale,
                softcap=softcap,
                tolerance=tolerance,
                unit_roundoff=unit_roundoff,
                stored_row=stored_row,
            ),
        )


def group_bias(
    mask: torch.Tensor | None, batch: int, selected: slice, group: int, query_rows: int, length: int, device: torch.device
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Additive bias and attended rows of one group, ``[group * Q, T]``.

    A floating mask at or below half of its dtype's minimum is no bias but a prohibition; only a query row that is allowed
    nothing else falls back to adding it, which is what plain attention computes (a uniform average for a row of ``finfo.min``).
    """
    if mask is None:
        return None, torch.ones(group * query_rows, length, dtype=torch.bool, device=device)
    rows = mask[batch if mask.shape[0] > 1 else 0]
    rows = rows[selected] if rows.shape[0] > 1 else rows.expand(group, -1, -1)
    rows = rows.expand(group, query_rows, rows.shape[-1])
    rows = (rows.expand(-1, -1, length) if rows.shape[-1] == 1 else rows[..., :length]).reshape(group * query_rows, length)
    if rows.dtype == torch.bool:
        return None, rows
    bias = rows.float()
    attended = ~(bias <= ops.mask_floor(rows.dtype))
    nothing = ~attended.any(-1)
    attended = torch.where(nothing[:, None], bias > -math.inf, attended)
    return bias, attended


def masked_scores(call: HeadCall, raw: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
    """Capped and biased scores from ``raw`` ones, scaled products ``[M, T]``; -inf where a query row does not attend.

    Args:
        rows: bool ``[T]``: the cache rows that ``raw`` is about, if not all.
    """
    bias, attended = call.bias, call.attended
    if rows is not None:
        bias, attended = None if bias is None else bias[:, rows], attended[:, rows]
    scores = call.softcap * torch.tanh(raw / call.softcap) if call.softcap > 0 else raw
    if bias is not None:
        scores = scores + bias
    return scores.masked_fill(~attended, -math.inf)


def with_sinks(call: HeadCall, scores: torch.Tensor) -> torch.Tensor:
    """``scores`` with the sinks, if there are any, as one more column."""
    return scores if call.sinks is None else torch.cat([scores, call.sinks[:, None].to(scores.dtype)], -1)


def masked_softmax(call: HeadCall, scores: torch.Tensor) -> torch.Tensor:
    """Weights ``[M, T]`` of the rows, which sum to less than 1 beside a sink. A query row that attends to nothing gives zeros,
    as in ``scaled_dot_product_attention``."""
    every = with_sinks(call, scores)
    weights = torch.where((every == -math.inf).all(-1, keepdim=True), 0.0, every.softmax(-1))
    return weights[:, : scores.shape[-1]]


def norms_in_range(call: HeadCall, rms_value: float, weights: torch.Tensor) -> bool:
    """Whether squares of errors stay inside float32: the rms norm of V's rows, times what sinks leave of the weights."""
    if not NORM_RANGE[0] <= rms_value <= NORM_RANGE[1]:
        return False
    left = weights.sum(-1)
    return call.sinks is None or not bool(((left > 0) & (left * rms_value < NORM_RANGE[0])).any())


def read_full(call: HeadCall, counts: ReadCounts, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Plain attention in ``dtype`` over the rows that any query row attends to."""
    rows = call.attended.any(0)
    keys, values = call.key[rows].to(dtype), call.value[rows].to(dtype)
    live = int(rows.sum())
    counts.bytes_read += live * call.stored_row
    counts.bytes_full += live * (call.key.shape[-1] + call.value.shape[-1]) * call.key.element_size()
    counts.rows += live
    counts.key_rows_full += live
    counts.value_rows_full += live
    scores = masked_scores(call, call.query.to(dtype) @ keys.T * call.scale, rows)
    weights, attended = masked_softmax(call, scores), call.attended[:, rows]
    if not bool(torch.isfinite(values).all()):  # a masked row changes nothing, whatever it holds
        return torch.stack([w[a] @ values[a] for w, a in zip(weights, attended, strict=True)])
    return weights @ values


def dequantize(hi: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """Rows of a 4-bit plane: the middle of the code's interval, less the dither."""
    return (hi.float() - NIBBLE_CENTER - offset[:, None]) * (scale[..., None] * (HI_STEP / CODE_RANGE))


def key_nibbles(views: ArenaViews, head: int | slice) -> torch.Tensor:
    """uint8 ``[rows, Dk']`` of one head, or ``[heads, rows, Dk']``: the 4-bit plane of K, in its device's order."""
    if score_ordered(views.key_hi.device):
        return unpack_score_order(views.key_hi[head])
    return unpack_row_order(views.key_hi_rows[head])


def block_means(call: HeadCall, views: ArenaViews, head: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which rows ``[T]`` lie in a block whose mean may stand in for them, and the means ``[blocks, Dv]``.

    A block qualifies when it is complete and every query row attends to all of it: a masked row is never part of a mean.
    """
    length = call.attended.shape[-1]
    blocks = views.value_count.shape[-1]
    attended = torch.nn.functional.pad(call.attended.all(0), (0, blocks * BLOCK_ROWS - length))[: blocks * BLOCK_ROWS]
    complete = attended.view(blocks, BLOCK_ROWS).all(-1) & (views.value_count[head] == BLOCK_ROWS)
    means = torch.where(complete[:, None], views.value_sum[head] / BLOCK_ROWS, 0.0)
    return complete.repeat_interleave(BLOCK_ROWS)[:length], means


def skipped_output(weights: torch.Tensor, kept: torch.Tensor, means: torch.Tensor) -> torch.Tensor:
    """Output of the rows not read: each block's mean times the weight skipped in it."""
    skipped = weights.masked_fill(kept, 0.0)
    blocks = means.shape[0]
    skipped = torch.nn.functional.pad(skipped, (0, blocks * BLOCK_ROWS - skipped.shape[-1]))
    return skipped.view(-1, blocks, BLOCK_ROWS).sum(-1) @ means


def weight_error(sigma: torch.Tensor) -> torch.Tensor:
    """rms error of a weight over the weight, from the rms error ``sigma`` of its score, elementwise."""
    return sigma * torch.sqrt(_weight_error_factor(sigma.square()))


_weight_error_factor = sympy.lambdify(sympy.Symbol("x", positive=True), EXPRESSIONS["weight_error_factor"], "math")
