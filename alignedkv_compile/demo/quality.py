"""Accuracy: logits against the same weights in fp32, teacher-forced through the decode path, and greedy text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .. import reset_stats, stats
from .variants import ALIGNED, Variant


@dataclass(frozen=True)
class Quality:
    """How far a variant's next-token distributions are from the fp32 model's.

    Attributes:
        variant: name of the variant.
        context: tokens in the cache before the first position.
        positions: how many positions were compared.
        bytes: bytes read from the cache over what its live rows take in their own dtype; 1 for stock.
        kl_mean, kl_p99: KL(fp32 || variant) in nats, mean and 99th percentile over positions.
        top1_agreement: share of positions where both have the same most likely token.
        nll: mean negative log-likelihood of the document's true next token, in nats.
        nll_reference: the same of the fp32 model.
    """

    variant: str
    context: int
    positions: int
    bytes: float
    kl_mean: float
    kl_p99: float
    top1_agreement: float
    nll: float
    nll_reference: float


@dataclass(frozen=True)
class Continuation:
    """Greedy text of one variant.

    Attributes:
        variant: name of the variant.
        context: tokens in the cache before the first one.
        tokens: the generated ids.
        text: the same, decoded.
        first_difference: index of the first id that differs from stock eager's, None when all are equal.
    """

    variant: str
    context: int
    tokens: tuple[int, ...]
    text: str
    first_difference: int | None


def teacher_forced(
    variant: Variant,
    cache: Any,
    context: int,
    following: torch.Tensor,
    reference: torch.Tensor,
    advance: Callable[[int], None] = lambda _: None,
) -> Quality:
    """Feed the document's true tokens one at a time and compare every distribution with the reference.

    Args:
        variant: how the model is run.
        cache: holds ``context`` tokens; grows by one row per position.
        context: tokens in the cache.
        following: int64 ``[1, M]``, the document after the context; ``M > P``.
        reference: float32 log-probabilities ``[P, vocabulary]`` of the fp32 model at the first ``P`` of them.
        advance: called with 1 after every position.
    """
    positions = reference.shape[0]
    divergence, agree, nll = torch.empty(positions), 0, 0.0
    if variant.name == ALIGNED:
        reset_stats()
    with variant.compiling():
        for row in range(positions):
            found = variant.decode(following[:, row : row + 1], cache)[0].float().log_softmax(-1)
            expected = reference[row]
            divergence[row] = (expected.exp() * (expected - found)).sum()
            agree += int(found.argmax() == expected.argmax())
            nll -= float(found[following[0, row + 1]])
            advance(1)
    targets = following[0, 1 : positions + 1]
    return Quality(
        variant=variant.name,
        context=context,
        positions=positions,
        bytes=stats().fraction if variant.name == ALIGNED else 1.0,
        kl_mean=float(divergence.mean()),
        kl_p99=float(divergence.quantile(0.99)),
        top1_agreement=agree / positions,
        nll=nll / positions,
        nll_reference=-float(reference.gather(1, targets[:, None]).mean()),
    )


def greedy(
    variant: Variant, cache: Any, first: torch.Tensor, count: int, advance: Callable[[int], None] = lambda _: None
) -> list[int]:
    """Ids of ``count`` tokens decoded greedily after ``first [1, 1]``."""
    token, ids = first, []
    with variant.compiling():
        for _ in range(count):
            token = variant.decode(token, cache).argmax(-1, keepdim=True)
            ids.append(int(token))
            advance(1)
    return ids


def first_difference(left: Sequence[int], right: Sequence[int]) -> int | None:
    """Index of the first element that differs, None for equal sequences of one length."""
    return next((index for index, pair in enumerate(zip(left, right, strict=True)) if pair[0] != pair[1]), None)
