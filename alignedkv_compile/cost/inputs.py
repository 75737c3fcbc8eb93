"""A made-up attention layer to time reads on: how few bytes a read needs depends on how peaked its attention is, on what the
query heads of a group have in common, and on how far values point one way.

The numbers are near those of SmolLM2-135M, on the side of more bytes: ``benchmarks/capture.py`` prints the model's for the
decode step that it captures, and ``docs/operator.md`` has the bytes that both need.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

MEDIAN_KEYS = 27.0
"""Median over query heads of the effective number of keys, exp(entropy of the softmax weights); a model's is 12 to 19."""
SPREAD_OF_KEYS = 1.7
"""Standard deviation over query heads of its logarithm."""
LEAST_KEYS = 4.0
"""Fewer are not asked for: a model's most peaked heads see one row that stands out, which normal numbers do not have."""
MOST_OF_CONTEXT = 0.25
"""Largest effective number of keys, as a share of the rows."""
SHARED_DIRECTION = 0.5
"""Share of their squared length that the query rows of a KV head have in common, and hence what their scores correlate by;
those of a model by 0.7 to 0.9."""
SHARED_VALUE = 0.125
"""Share of V's squared length that lies in the mean of all rows."""

BISECTION_STEPS = 24
LARGEST_FACTOR = 64.0


def made_up_cache(
    heads: int, rows: int, key_dim: int, value_dim: int, dtype: torch.dtype, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """K ``[heads, rows, Dk]``, independent normal numbers, and V ``[heads, rows, Dv]``, normal around a mean."""
    key, value = (torch.empty(heads, rows, dim, dtype=dtype, device=generator.device) for dim in (key_dim, value_dim))
    for head in range(heads):  # one at a time, to bound the memory
        key[head] = _normal((rows, key_dim), generator)
        value[head] = _mixed(_normal((1, value_dim), generator), _normal((rows, value_dim), generator), SHARED_VALUE)
    return key, value


def made_up_directions(heads: int, rows_per_head: int, dim: int, generator: torch.Generator) -> torch.Tensor:
    """Queries that :func:`query_factors` scales, ``[heads, rows_per_head, dim]``, float32, their elements of variance 1."""
    shared = _normal((heads, 1, dim), generator)
    return _mixed(shared, _normal((heads, rows_per_head, dim), generator), SHARED_DIRECTION)


def query_factors(scores: torch.Tensor, breadth: float = 1.0) -> torch.Tensor:
    """What each query row has to be multiplied by for its effective number of keys to be one of a model's.

    Args:
        scores: ``[heads, rows_per_head, context]``, floating, scaled as the softmax takes them.
        breadth: of the attention: so many times as many keys as a model's.

    Returns:
        ``[heads, rows_per_head, 1]``.
    """
    targets = _model_keys(scores[..., 0].numel(), scores.shape[-1], breadth).view(scores.shape[:-1]).to(scores.device)
    return bisected(lambda factors: effective_keys(scores * factors[..., None]) > targets, targets)[..., None]


def effective_keys(scores: torch.Tensor) -> torch.Tensor:
    """exp(entropy of the softmax) of each row of ``scores [..., rows]``."""
    return torch.special.entr(scores.softmax(-1)).sum(-1).exp()


def bisected(too_small: Callable[[torch.Tensor], torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    """The least factors between 0 and :data:`LARGEST_FACTOR` that are not ``too_small``, in a tensor like ``like``."""
    low, high = torch.zeros_like(like), torch.full_like(like, LARGEST_FACTOR)
    for _ in range(BISECTION_STEPS):
        middle = (low + high) / 2
        small = too_small(middle)
        low, high = torch.where(small, middle, low), torch.where(small, high, middle)
    return high


def _model_keys(count: int, context: int, breadth: float) -> torch.Tensor:
    """So many effective numbers of keys: quantiles of the model's log-normal distribution, in a fixed random order."""
    normal = statistics.NormalDist()
    quantiles = torch.tensor([normal.inv_cdf((index + 0.5) / count) for index in range(count)])
    keys = (MEDIAN_KEYS * breadth * (SPREAD_OF_KEYS * quantiles).exp()).clamp(LEAST_KEYS, MOST_OF_CONTEXT * context)
    return keys[torch.randperm(count, generator=torch.Generator().manual_seed(0))]


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=generator, device=generator.device)


def _mixed(shared: torch.Tensor, own: torch.Tensor, share: float) -> torch.Tensor:
    """Of whose squared length ``share`` is the first's."""
    return share**0.5 * shared + (1 - share) ** 0.5 * own
