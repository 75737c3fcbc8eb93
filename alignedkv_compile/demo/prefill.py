"""One fp32 prefill of the whole document: it seeds every cache, and gives the reference logits.

Prefilling in fp32 and casting K and V to bfloat16 costs far less than a bfloat16 prefill on processors without bfloat16
arithmetic, and gives every variant the very same past. RoPE rotates by absolute position, so that the first 2k rows of an 8k
prefill are a 2k prefill.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

CHUNK = 512
"""Tokens per forward pass of the prefill."""


@dataclass(frozen=True)
class Past:
    """K and V of a prefilled document, from which caches are made.

    Attributes:
        config: the model's ``transformers`` config.
        layers: per layer K and V, each ``[1, H, N, D]`` in the model's dtype.
    """

    config: Any
    layers: tuple[tuple[torch.Tensor, torch.Tensor], ...]

    def static_cache(self, length: int, capacity: int) -> Any:
        """A new ``StaticCache`` of ``capacity`` rows that holds the first ``length`` tokens."""
        from transformers import StaticCache

        return self.fill(StaticCache(config=self.config, max_cache_len=capacity), length)

    def dynamic_cache(self, length: int) -> Any:
        """A new ``DynamicCache`` that holds the first ``length`` tokens."""
        from transformers import DynamicCache

        return self.fill(DynamicCache(config=self.config), length)

    def fill(self, cache: Any, length: int) -> Any:
        """``cache``, which is empty, with the first ``length`` tokens."""
        for index, (key, value) in enumerate(self.layers):
            cache.update(key[:, :, :length].clone(), value[:, :, :length].clone(), index)
        return cache


@torch.no_grad()
def prefill(
    model: Any, tokens: torch.Tensor, reference_rows: int, advance: Callable[[int], None] = lambda _: None
) -> tuple[Past, torch.Tensor]:
    """Run an fp32 copy of ``model`` over ``tokens [1, N]``.

    Args:
        model: the model under test; its weights are cast up exactly, so the fp32 copy computes with the same numbers.
        tokens: int64 ``[1, N]``.
        reference_rows: for how many last positions the fp32 log-probabilities are kept.
        advance: called with the number of tokens that each step has done.

    Returns:
        The past (``N - reference_rows`` tokens, in the model's dtype), and float32 log-probabilities
        ``[reference_rows, vocabulary]`` of the token after each of the last ``reference_rows`` ones.
    """
    from transformers import DynamicCache

    reference = copy.deepcopy(model).float()
    cache = DynamicCache(config=model.config)
    length = tokens.shape[1] - reference_rows
    for start in range(0, length, CHUNK):
        chunk = tokens[:, start : min(start + CHUNK, length)]
        reference(input_ids=chunk, past_key_values=cache, logits_to_keep=1)
        advance(chunk.shape[1])
    layers = tuple((layer.keys.to(model.dtype), layer.values.to(model.dtype)) for layer in cache.layers)
    logits = reference(input_ids=tokens[:, length:], past_key_values=cache, logits_to_keep=reference_rows).logits
    advance(reference_rows)
    return Past(model.config, layers), logits[0].log_softmax(-1)
