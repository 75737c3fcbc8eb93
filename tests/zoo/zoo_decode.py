"""Decoding the same tokens with a model and with compiled forms of it, and keeping what came out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from zoo_backend import ZooBackend, layers_of
from zoo_models import TinyModel, random_tokens

PREFILL = 7
STEPS = 6
"""With seven rows of prefill, a window of ten is full after three steps and rolls in the others."""


@dataclass(frozen=True)
class Decoded:
    """What one way of decoding gave.

    Attributes:
        logits: of the last position after prefill and after each step, ``[B, vocabulary]``.
        cache: every tensor of the cache at the end, by layer and attribute.
    """

    logits: tuple[torch.Tensor, ...]
    cache: Mapping[str, torch.Tensor]

    @property
    def finite(self) -> bool:
        """Whether all logits are numbers."""
        return all(bool(step.isfinite().all()) for step in self.logits)


def decode(model: TinyModel, kind: str, steps: int = STEPS) -> Decoded:
    """Prefill and decode eagerly."""
    cache = model.new_cache(kind)
    tokens = random_tokens(PREFILL + steps)
    logits = [_forward(model.module, model, cache, tokens[:, :PREFILL])]
    logits += [_forward(model.module, model, cache, tokens[:, step : step + 1]) for step in range(PREFILL, PREFILL + steps)]
    return Decoded(tuple(logits), cache_tensors(cache))


def decode_compiled(model: TinyModel, kind: str, backend: ZooBackend, steps: int = STEPS) -> dict[str, Decoded]:
    """Prefill eagerly, decode through ``torch.compile``, for each variant of the backend over a cache of its own.

    The variants take turns step by step, so that each graph that one of them needed serves the others too.
    """
    torch._dynamo.reset()
    run = torch.compile(model.module, backend=backend)
    tokens = random_tokens(PREFILL + steps)
    caches = {name: model.new_cache(kind) for name in backend.graphs}
    logits = {name: [_forward(model.module, model, cache, tokens[:, :PREFILL])] for name, cache in caches.items()}
    with torch._dynamo.config.patch(recompile_limit=64):
        for step in range(PREFILL, PREFILL + steps):
            for name, cache in caches.items():
                backend.selected, backend.cache = name, cache
                logits[name].append(_forward(run, model, cache, tokens[:, step : step + 1]))
    return {name: Decoded(tuple(logits[name]), cache_tensors(cache)) for name, cache in caches.items()}


def cache_tensors(cache: Any) -> dict[str, torch.Tensor]:
    """Every tensor of a cache's layers, one level of lists and dicts deep."""
    found: dict[str, torch.Tensor] = {}
    for layer_name, layer in layers_of(cache):
        for attribute, value in vars(layer).items():
            parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else [("", value)]
            found |= {f"layer {layer_name} {attribute} {key}".rstrip(): v for key, v in parts if isinstance(v, torch.Tensor)}
    return found


def _forward(run: Callable[..., Any], model: TinyModel, cache: Any, tokens: torch.Tensor) -> torch.Tensor:
    output = run(**model.inputs(tokens), past_key_values=cache, use_cache=True)
    return output.logits[:, -1].detach().clone()
