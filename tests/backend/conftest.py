"""The smallest things that the backend rewrites: one decode step over a static and over a dynamic cache, and a tiny Llama."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16


@pytest.fixture(autouse=True)
def _no_older_graphs() -> None:
    """``stats()`` sums over all live graphs, and those of earlier tests may live until their cycles are collected."""
    gc.collect()


def static_step(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    mask: torch.Tensor,
) -> torch.Tensor:
    """Write rows into preallocated caches, then attend over them."""
    keys.index_copy_(2, positions, key)
    values.index_copy_(2, positions, value)
    return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, enable_gqa=True)


def dynamic_step(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Concatenate rows to caches, then attend over the result."""
    keys = torch.cat([keys, key], -2)
    values = torch.cat([values, value], -2)
    return F.scaled_dot_product_attention(query, keys, values, enable_gqa=True), keys, values


def second_writer_step(*args: torch.Tensor) -> torch.Tensor:
    """A site that must be declined: the cache is also written by something else in the same graph."""
    output = static_step(*args)
    args[3].mul_(1.0)
    return output


@dataclass
class StaticInputs:
    """Caches of ``capacity`` rows and the arguments of step after step."""

    capacity: int
    dtype: torch.dtype = torch.float32
    length: int = 0

    def __post_init__(self) -> None:
        self.keys = torch.zeros(1, KV_HEADS, self.capacity, HEAD_DIM, dtype=self.dtype)
        self.values = torch.zeros_like(self.keys)

    def next(self, rows: int = 1) -> tuple[torch.Tensor, ...]:
        """Arguments of :func:`static_step` for ``rows`` more tokens."""
        query = torch.randn(1, HEADS, rows, HEAD_DIM, dtype=self.dtype)
        new = [torch.randn(1, KV_HEADS, rows, HEAD_DIM, dtype=self.dtype) for _ in range(2)]
        positions = torch.arange(self.length, self.length + rows)
        mask = (torch.arange(self.capacity)[None] <= positions[:, None])[None, None]
        self.length += rows
        return query, *new, self.keys, self.values, positions, mask


@pytest.fixture
def steps() -> Any:
    """The functions above, as attributes."""

    class Steps:
        static = staticmethod(static_step)
        dynamic = staticmethod(dynamic_step)
        declined = staticmethod(second_writer_step)
        inputs = StaticInputs
        heads, kv_heads, head_dim = HEADS, KV_HEADS, HEAD_DIM

    return Steps


@pytest.fixture(scope="session")
def tiny_llama() -> Any:
    """A random Llama of two layers, fp32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=HEADS * HEAD_DIM,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=1024,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def no_grad() -> Any:
    """Everything under ``torch.no_grad()``."""
    with torch.no_grad():
        yield
