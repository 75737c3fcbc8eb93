"""A Llama-3.1-8B-shaped model and a filled cache, for :mod:`gpu_decode`.

The weights are random, and the cache holds random numbers, so that nothing is downloaded and no prefill is waited for. Random
attention is flat, which would flatter nobody: each layer's query projection is scaled until its attention over the filled cache
has a stated number of effective keys, exp(entropy). The vocabulary shrinks with the number of layers, so that the output layer
weighs what it does in the whole model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

SPARE_ROWS = 64
"""Rows of the cache beyond the context."""
WHOLE_LAYERS, WHOLE_VOCABULARY = 32, 128256
"""Of the whole Llama-3.1-8B."""


@dataclass(frozen=True)
class ModelShape:
    """Of the model and the cache; the defaults are a quarter of Llama-3.1-8B's layers after 32k tokens."""

    layers: int = 8
    hidden: int = 4096
    intermediate: int = 14336
    query_heads: int = 32
    heads: int = 8
    context: int = 32768
    effective_keys: float = 128.0

    @property
    def head_dim(self) -> int:
        return self.hidden // self.query_heads

    @property
    def vocabulary(self) -> int:
        return WHOLE_VOCABULARY * self.layers // WHOLE_LAYERS


TINY = ModelShape(layers=2, hidden=64, intermediate=96, query_heads=4, heads=2, context=640, effective_keys=32.0)
"""For a CPU, where nothing but the program itself is tried out."""


@torch.no_grad()
def build(shape: ModelShape, device: torch.device) -> Any:
    """A model in bfloat16 with random weights of its own initialisation, always the same."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.query_heads,
        num_key_value_heads=shape.heads,
        vocab_size=shape.vocabulary,
        max_position_embeddings=131072,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


@torch.no_grad()
def filled_cache(model: Any, shape: ModelShape, batch: int, device: torch.device) -> Any:
    """A StaticCache whose first ``context`` rows are standard normal numbers, always the same."""
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=shape.context + SPARE_ROWS)
    cache.early_initialization(batch, shape.heads, shape.head_dim, torch.bfloat16, device)
    generator = torch.Generator(device).manual_seed(1)
    for layer in cache.layers:
        for tensor in (layer.keys, layer.values):
            tensor[:, :, : shape.context].normal_(generator=generator)
        layer.cumulative_length.fill_(shape.context)
    return cache


@torch.no_grad()
def sharpen(model: Any, shape: ModelShape, device: torch.device, measure_only: bool = False) -> list[float]:
    """Scale each layer's queries to ``effective_keys`` over a filled cache; effective keys per layer before that.

    Queries are taken before RoPE: cached keys point nowhere in particular, so that rotating a query changes nothing on average.
    """
    cache, found, hooks = filled_cache(model, shape, 1, device), list[float](), []

    def hook_of(keys: torch.Tensor) -> Callable[..., torch.Tensor]:
        def hook(projection: Any, _inputs: object, output: torch.Tensor) -> torch.Tensor:
            rows = output[0, 0].view(shape.heads, -1, shape.head_dim).float()
            scores = torch.stack([row @ head.float().T for row, head in zip(rows, keys, strict=True)]) * shape.head_dim**-0.5
            found.append(_effective_keys(scores))
            if measure_only:
                return output
            low, high = 0.0, 256.0
            for _ in range(24):
                middle = (low + high) / 2
                low, high = (middle, high) if _effective_keys(scores * middle) > shape.effective_keys else (low, middle)
            projection.weight.mul_(high)
            return output * high

        return hook

    for layer, cached in zip(model.model.layers, cache.layers, strict=True):
        hooks.append(layer.self_attn.q_proj.register_forward_hook(hook_of(cached.keys[0, :, : shape.context])))
    try:
        token = token_inputs(tokens_to_decode(shape, 1, device), 1 if measure_only else 0, shape)
        model.forward(**token, past_key_values=cache)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _effective_keys(scores: torch.Tensor) -> float:
    weights = scores.log_softmax(-1)
    return float((-(weights.exp() * weights).sum(-1)).exp().mean())


def tokens_to_decode(shape: ModelShape, batch: int, device: torch.device) -> torch.Tensor:
    """Ids of the tokens to decode, ``[batch, SPARE_ROWS]``; the same for all sequences, whose caches differ."""
    generator = torch.Generator().manual_seed(2)
    return torch.randint(0, shape.vocabulary, (1, SPARE_ROWS), generator=generator).expand(batch, -1).to(device)


def token_inputs(tokens: torch.Tensor, index: int, shape: ModelShape) -> dict[str, torch.Tensor]:
    """What the model's forward takes to decode one of ``tokens``, but for the cache."""
    ids = tokens[:, index : index + 1].contiguous()
    return {"input_ids": ids, "position_ids": torch.full_like(ids, shape.context + index)}


def gib_needed(shape: ModelShape, batch: int) -> float:
    """Rough device memory of one variant: weights, cache, planes, K and V of one layer repeated per query head."""
    weights = 2 * (
        shape.layers * shape.hidden * (2.5 * shape.hidden + 3 * shape.intermediate) + 2 * shape.vocabulary * shape.hidden
    )
    layer = 4 * batch * (shape.context + SPARE_ROWS) * shape.heads * shape.head_dim
    return (weights + 1.5 * shape.layers * layer + layer * shape.query_heads // shape.heads) / 2**30 + 1.0
