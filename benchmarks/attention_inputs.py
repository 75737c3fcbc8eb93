"""Queries, keys and values for the attention benchmark: made up like a model's, independent, or captured from a model.

Like a model's: as :mod:`alignedkv_compile.cost.inputs` says, which calibrations use too. Independent: K, V and the direction of
every query row are independent standard normal numbers, and the queries of all heads are scaled by one factor until the
*effective number of keys*, exp(entropy of the softmax weights), averaged over query heads, is ``effective_keys``. In
the step of SmolLM2-135M that ``capture.py`` takes at 7936 rows it is 144, near the default of 128, and the median is 19.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import typer

from alignedkv_compile.cost import inputs as model_like

MODEL, INDEPENDENT = "model", "independent"
"""Kinds of made-up layers, as the option ``--inputs`` names them."""

EFFECTIVE_KEYS = 128.0
"""Of independent inputs, on average over query heads."""


@dataclass(frozen=True)
class Shape:
    """Query heads, KV heads and head dimension of one attention layer."""

    query_heads: int
    heads: int
    head_dim: int

    def __str__(self) -> str:
        return f"{self.query_heads}/{self.heads}/{self.head_dim}"

    @property
    def group(self) -> int:
        return self.query_heads // self.heads


@dataclass(frozen=True)
class Layer:
    """One layer's decode step.

    Attributes:
        query: ``[B, Hq, 1, D]``.
        key, value: ``[B, H, C, D]``, contiguous, all rows live.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor

    @property
    def shape(self) -> Shape:
        return Shape(self.query.shape[1], self.key.shape[1], self.key.shape[3])

    @property
    def context(self) -> int:
        return self.key.shape[2]

    @property
    def scale(self) -> float:
        return float(self.key.shape[3] ** -0.5)

    @property
    def bytes_full(self) -> int:
        """Bytes of K and V in their own dtype."""
        return (self.key.numel() + self.value.numel()) * self.key.element_size()

    def clone(self) -> Layer:
        """The same numbers in memory of their own."""
        return Layer(self.query.clone(), self.key.clone(), self.value.clone())


def parse_inputs(name: str) -> str:
    """The option ``--inputs``."""
    if name not in (MODEL, INDEPENDENT):
        raise typer.BadParameter(f"{name!r} is none of {MODEL}, {INDEPENDENT}")
    return name


def layer_of(
    inputs: str,
    shape: Shape,
    context: int,
    dtype: torch.dtype,
    effective_keys: float,
    batch: int = 1,
    device: torch.device | str = "cpu",
) -> Layer:
    """A layer like a model's (:data:`MODEL`), or of independent numbers with so many effective keys."""
    of = {"batch": batch, "device": device}
    return (
        made_up(shape, context, dtype, **of)  # type: ignore[arg-type]
        if inputs == MODEL
        else synthetic(shape, context, dtype, effective_keys, **of)  # type: ignore[arg-type]
    )


def made_up(
    shape: Shape, context: int, dtype: torch.dtype, seed: int = 0, batch: int = 1, device: torch.device | str = "cpu"
) -> Layer:
    """One layer like a model's; arguments as for :func:`synthetic`."""
    generator = torch.Generator(device).manual_seed(seed)
    layers = [_made_up(shape, context, dtype, generator) for _ in range(batch)]
    if batch == 1:
        return layers[0]
    return Layer(*(torch.cat([getattr(layer, name) for layer in layers]) for name in ("query", "key", "value")))


def _made_up(shape: Shape, context: int, dtype: torch.dtype, generator: torch.Generator) -> Layer:
    """The same of one sequence."""
    direction = model_like.made_up_directions(shape.heads, shape.group, shape.head_dim, generator)
    key, value = model_like.made_up_cache(shape.heads, context, shape.head_dim, shape.head_dim, dtype, generator)
    factors = model_like.query_factors(_scores(direction.view(1, -1, 1, shape.head_dim), key[None], shape))
    return Layer((direction * factors).view(1, -1, 1, shape.head_dim).to(dtype), key[None], value[None])


def synthetic(
    shape: Shape,
    context: int,
    dtype: torch.dtype,
    effective_keys: float,
    seed: int = 0,
    batch: int = 1,
    device: torch.device | str = "cpu",
) -> Layer:
    """One layer of independent numbers, as the module's docstring says.

    Args:
        shape: heads and head dimension.
        context: cache rows.
        dtype: of all three tensors; the queries are scaled on the rounded keys.
        effective_keys: mean over query heads of exp(entropy of the weights); at most about ``context``.
        seed: of the generator.
        batch: sequences; one scale for the queries of all.
        device: of all tensors; each device has random numbers of its own.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(heads: int, rows: int, dtype: torch.dtype) -> torch.Tensor:
        """One sequence at a time, to bound the memory."""
        found = torch.empty(batch, heads, rows, shape.head_dim, dtype=dtype, device=device)
        for sequence in found:
            sequence.copy_(torch.randn(sequence.shape, generator=generator, device=device))
        return found

    key, value = normal(shape.heads, context, dtype), normal(shape.heads, context, dtype)
    direction = normal(shape.query_heads, 1, torch.float32)
    factor = query_factor(_scores(direction, key, shape), effective_keys)
    return Layer((direction * factor).to(dtype), key, value)


def effective_keys(layer: Layer) -> float:
    """Mean over query heads of exp(entropy of the softmax weights)."""
    return _spread(_scores(layer.query.float(), layer.key, layer.shape))


def query_factor(scores: torch.Tensor, effective_keys: float = EFFECTIVE_KEYS) -> float:
    """What queries have to be multiplied by for their weights to be spread over ``effective_keys`` rows on average.

    Args:
        scores: ``[..., rows]``, floating, scaled as the softmax takes them.
        effective_keys: at most about ``rows``.
    """

    def too_small(factor: torch.Tensor) -> torch.Tensor:
        return torch.tensor(_spread(scores * float(factor)) > effective_keys)

    return float(model_like.bisected(too_small, torch.zeros(())))


def _spread(scores: torch.Tensor) -> float:
    """Mean over rows of ``scores [..., rows]`` of exp(entropy of their softmax)."""
    return float(model_like.effective_keys(scores).mean())


@dataclass(frozen=True)
class Peakedness:
    """What decides how few bits a read of some layers needs.

    Attributes:
        median_keys, mean_keys, most_keys: effective number of keys over query heads, the last its 90th percentile.
        spread_of_keys: standard deviation of its logarithm.
        correlation: of the scores of two query heads that share a KV head, the median; NaN without such heads.
        shared_value: share of V's squared length that lies in the mean over rows, the median over KV heads.
    """

    median_keys: float
    mean_keys: float
    most_keys: float
    spread_of_keys: float
    correlation: float
    shared_value: float

    def __str__(self) -> str:
        return (
            f"effective keys {self.median_keys:.3g} (median), {self.mean_keys:.3g} (mean), "
            f"{self.most_keys:.3g} (90th percentile), standard deviation of their logarithm {self.spread_of_keys:.2f}; "
            f"scores of a group correlate by {self.correlation:.2f}; share of V in its mean {self.shared_value:.2f}"
        )


def peakedness(layers: Sequence[Layer]) -> Peakedness:
    """Measured over all heads of some layers."""
    keys, correlations, shares = [], [], []
    for layer in layers:
        scores = _scores(layer.query.float(), layer.key, layer.shape)
        keys.append(model_like.effective_keys(scores).flatten())
        above = torch.ones(layer.shape.group, layer.shape.group).triu(1).bool()
        correlations += [torch.corrcoef(rows).view_as(above)[above] for rows in scores]
        value = layer.value.float()
        shares.append((value.mean(2).square().sum(-1) / value.square().sum(-1).mean(2)).flatten())
    every, between = torch.cat(keys), torch.cat(correlations)
    return Peakedness(
        float(every.median()),
        float(every.mean()),
        float(every.quantile(0.9)),
        float(every.log().std()),
        float(between.median()) if between.numel() else math.nan,
        float(torch.cat(shares).median()),
    )


def captured(path: Path) -> list[Layer]:
    """The layers that ``benchmarks/capture.py`` saved.

    Raises:
        ValueError: the file holds something else.
    """
    saved = torch.load(path, weights_only=True)
    if not isinstance(saved, dict) or not {"query", "key", "value"} <= set(saved):
        raise ValueError(f"{path} was not written by benchmarks/capture.py: no query, key and value in it")
    return [Layer(*tensors) for tensors in zip(saved["query"], saved["key"], saved["value"], strict=True)]


def exact_attention(layer: Layer) -> torch.Tensor:
    """Attention in float64 on the stored values, ``[B, Hq, 1, D]``, one KV head at a time."""
    rows = _rows_of_heads(layer.query, layer.shape).double()
    outputs = []
    for row, key, value in zip(rows, layer.key.flatten(0, 1), layer.value.flatten(0, 1), strict=True):
        weights = (row @ key.double().T * layer.scale).softmax(-1)
        outputs.append(weights @ value.double())
    return torch.cat(outputs).view(*layer.query.shape[:3], -1)


def _scores(query: torch.Tensor, key: torch.Tensor, shape: Shape) -> torch.Tensor:
    """float32 ``[B * H, group, C]``, one KV head at a time to bound the memory."""
    pairs = zip(_rows_of_heads(query, shape), key.flatten(0, 1), strict=True)
    return torch.stack([row @ head.float().T for row, head in pairs]) * shape.head_dim**-0.5


def _rows_of_heads(query: torch.Tensor, shape: Shape) -> torch.Tensor:
    """``[B, Hq, 1, D]`` as ``[B * H, group, D]``."""
    return query[:, :, 0].reshape(-1, shape.group, query.shape[3])
