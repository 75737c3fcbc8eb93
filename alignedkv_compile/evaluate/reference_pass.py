"""The fp32 model: one prefill of the longest context seeds every cache, and its logits are what others are compared with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..demo.prefill import CHUNK, Past


@dataclass(frozen=True)
class Reference:
    """What the fp32 model computed.

    Attributes:
        past: K and V of the text, cast to the dtype of the model under test.
        log_probabilities: by context, float32 ``[P, vocabulary]`` after each of the ``P`` tokens that follow it.
    """

    past: Past
    log_probabilities: dict[int, torch.Tensor]


@torch.no_grad()
def compute_reference(
    model: Any, tokens: torch.Tensor, contexts: Sequence[int], positions: int, advance: Callable[[int], None] = lambda _: None
) -> Reference:
    """Run an fp32 copy of ``model`` over a text.

    Args:
        model: the model under test; its weights are cast up exactly, so both compute with the same numbers.
        tokens: int64 ``[1, N]``, ``N > max(contexts) + positions``.
        contexts: tokens before the positions that are compared.
        positions: how many.
        advance: called with the number of tokens that each step has done.
    """
    from transformers import DynamicCache

    reference = copy.deepcopy(model).float()
    cache = DynamicCache(config=model.config)
    longest = max(contexts)
    for start in range(0, longest, CHUNK):
        chunk = tokens[:, start : min(start + CHUNK, longest)]
        reference(input_ids=chunk, past_key_values=cache, logits_to_keep=1)
        advance(chunk.shape[1])
    layers = tuple((layer.keys, layer.values) for layer in cache.layers)
    exact_past = Past(model.config, layers)
    found = {}
    for context in contexts:
        following = tokens[:, context : context + positions]
        seeded = exact_past.dynamic_cache(context)
        logits = reference(input_ids=following, past_key_values=seeded, logits_to_keep=positions).logits
        found[context] = logits[0].log_softmax(-1)
        advance(positions)
    return Reference(Past(model.config, tuple((k.to(model.dtype), v.to(model.dtype)) for k, v in layers)), found)
