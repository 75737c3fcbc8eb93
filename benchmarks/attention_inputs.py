"""Queries, keys and values for the attention benchmark: synthetic with a stated peakedness, or captured from a model.

Synthetic: K, V and the direction of every query row are independent standard normal numbers. Real attention is peaked, and
how much decides how few bytes are needed, so the queries are scaled until the *effective number of keys*, exp(entropy of the
softmax weights), averaged over query heads, is ``effective_keys``. On SmolLM2-135M over 8000 tokens of Python source that
average is 138 (median over layers and heads 27, 90th percentile 237), hence the default of 128 at every context length.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

EFFECTIVE_KEYS = 128.0
BISECTION_STEPS = 24


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
        query: ``[1, Hq, 1, D]``.
        key, value: ``[1, H, C, D]``, contiguous, all rows live.
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


def synthetic(shape: Shape, context: int, dtype: torch.dtype, effective_keys: float, seed: int = 0) -> Layer:
    """One layer as the module's docstring says.

    Args:
        shape: heads and head dimension.
        context: cache rows.
        dtype: of all three tensors; the queries are scaled on the rounded keys.
        effective_keys: mean over query heads of exp(entropy of the weights); at most about ``context``.
        seed: of the generator.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(heads: int, rows: int) -> torch.Tensor:
        return torch.randn(1, heads, rows, shape.head_dim, generator=generator)

    key, value = normal(shape.heads, context).to(dtype), normal(shape.heads, context).to(dtype)
    direction = normal(shape.query_heads, 1)
    scores = _scores(direction, key, shape)
    low, high = 0.0, 64.0
    for _ in range(BISECTION_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if _perplexity(scores * middle) > effective_keys else (low, middle)
    return Layer((direction * high).to(dtype), key, value)


def effective_keys(layer: Layer) -> float:
    """Mean over query heads of exp(entropy of the softmax weights)."""
    return _perplexity(_scores(layer.query.float(), layer.key, layer.shape))


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
    """Attention in float64 on the stored values, ``[1, Hq, 1, D]``, one KV head at a time."""
    group, outputs = layer.shape.group, []
    for head in range(layer.shape.heads):
        query = layer.query[0, head * group : (head + 1) * group, 0].double()
        weights = (query @ layer.key[0, head].double().T * layer.scale).softmax(-1)
        outputs.append(weights @ layer.value[0, head].double())
    return torch.cat(outputs)[None, :, None]


def _scores(query: torch.Tensor, key: torch.Tensor, shape: Shape) -> torch.Tensor:
    """float32 ``[H, group, C]``, one KV head at a time to bound the memory."""
    rows = query[0, :, 0].view(shape.heads, shape.group, -1)
    return torch.stack([rows[head] @ key[0, head].float().T for head in range(shape.heads)]) * shape.head_dim**-0.5


def _perplexity(scores: torch.Tensor) -> float:
    weights = scores.log_softmax(-1)
    return float((-(weights.exp() * weights).sum(-1)).exp().mean())
