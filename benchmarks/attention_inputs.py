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

from alignedkv_compile.cost.inputs import EFFECTIVE_KEYS as EFFECTIVE_KEYS
from alignedkv_compile.cost.inputs import query_factor, spread


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


def synthetic(
    shape: Shape,
    context: int,
    dtype: torch.dtype,
    effective_keys: float,
    seed: int = 0,
    batch: int = 1,
    device: torch.device | str = "cpu",
) -> Layer:
    """One layer as the module's docstring says.

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
    return spread(_scores(layer.query.float(), layer.key, layer.shape))


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
