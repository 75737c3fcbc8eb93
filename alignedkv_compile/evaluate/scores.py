"""How far a method's next-token distributions are from those of the same weights in fp32."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .teacher_forcing import Reading


@dataclass(frozen=True)
class Score:
    """One method at one context. Logarithms are natural; errors of attention are relative norms per layer, probe and head.

    Attributes:
        method: its name.
        context: tokens in the cache before the first position.
        positions: how many positions were compared.
        tolerance: of the aligned read, None for other methods.
        bytes: bytes read over the cache's own bytes.
        nll: mean negative log-likelihood of the true next token, in nats.
        perplexity: ``exp(nll)``.
        delta_nll, delta_nll_error: mean and standard error, over positions, of the NLL minus fp32's.
        delta_stock, delta_stock_error: the same minus stock 16-bit's.
        kl_mean, kl_error, kl_p99: KL(fp32 || method): mean, its standard error, 99th percentile over positions.
        flips: share of positions whose most likely token is not fp32's.
        attention_error, attention_p99: mean and 99th percentile of the attention error against float64.
        layer_errors: mean attention error of each layer.
        added_median, added_p99, added_worst: error that the read adds, in units of the output's rounding error: median and 99th
            percentile, and the root mean square of the worst layer. None for methods that compute in 16 bits.
        added_rms: root mean square over everything: what ``tolerance`` promises a bound on.
    """

    method: str
    context: int
    positions: int
    tolerance: float | None
    bytes: float
    nll: float
    perplexity: float
    delta_nll: float
    delta_nll_error: float
    delta_stock: float
    delta_stock_error: float
    kl_mean: float
    kl_error: float
    kl_p99: float
    flips: float
    attention_error: float
    attention_p99: float
    layer_errors: tuple[float, ...]
    added_rms: float | None
    added_median: float | None
    added_p99: float | None
    added_worst: float | None


def score(
    method: str,
    context: int,
    tolerance: float | None,
    found: torch.Tensor,
    reading: Reading,
    reference: torch.Tensor,
    stock: torch.Tensor,
    targets: torch.Tensor,
) -> Score:
    """Compare log-probabilities.

    Args:
        method: name.
        context: tokens before the first position.
        tolerance: of the aligned read, else None.
        found: float32 ``[P, vocabulary]`` log-probabilities of the method.
        reading: what it read.
        reference: the same of the fp32 model.
        stock: the same of stock 16-bit.
        targets: int64 ``[P]``, the true next tokens.
    """
    nll, nll_reference, nll_stock = (-x.gather(1, targets[:, None])[:, 0].double() for x in (found, reference, stock))
    divergence = (reference.exp() * (reference - found)).sum(-1).double()
    delta, delta_stock = nll - nll_reference, nll - nll_stock
    added = reading.added
    return Score(
        method=method,
        context=context,
        positions=len(targets),
        tolerance=tolerance,
        bytes=reading.bytes_read / reading.bytes_full,
        nll=float(nll.mean()),
        perplexity=math.exp(float(nll.mean())),
        delta_nll=float(delta.mean()),
        delta_nll_error=_standard_error(delta),
        delta_stock=float(delta_stock.mean()),
        delta_stock_error=_standard_error(delta_stock),
        kl_mean=float(divergence.mean()),
        kl_error=_standard_error(divergence),
        kl_p99=float(divergence.quantile(0.99)),
        flips=float((found.argmax(-1) != reference.argmax(-1)).double().mean()),
        attention_error=float(reading.errors.mean()),
        attention_p99=float(reading.errors.flatten().quantile(0.99)),
        layer_errors=tuple(reading.errors.flatten(1).mean(1).tolist()),
        added_rms=None if added is None else float(added.square().mean().sqrt()),
        added_median=None if added is None else float(added.median()),
        added_p99=None if added is None else float(added.flatten().quantile(0.99)),
        added_worst=None if added is None else float(added.flatten(1).square().mean(1).sqrt().max()),
    )


def _standard_error(samples: torch.Tensor) -> float:
    """Standard error of the mean, taking positions as independent; 0 for a single one."""
    return float(samples.std() / math.sqrt(len(samples))) if len(samples) > 1 else 0.0
