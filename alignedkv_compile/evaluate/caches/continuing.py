"""Fill a cache with a text's K and V, and run the model over what follows."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .held import held_bytes
from .kinds import CacheKind
from .prefilled import Continuation, Prefilled

CHUNK = 16
"""Tokens per forward pass. Only the newest rows, at most this many, may be attended in more bits than they are stored in;
decoding one by one would take 16 times as long, and has one such row."""


@dataclass(frozen=True)
class Continued:
    """What a model with one kind of cache expects.

    Attributes:
        log_probabilities: for every continuation, float32 ``[len(targets), vocabulary]``.
        held: bytes of the cache after the last continuation.
        rows: rows in it.
    """

    log_probabilities: tuple[torch.Tensor, ...]
    held: int
    rows: int


@torch.no_grad()
def run_after(
    model: Any,
    kind: CacheKind,
    prefilled: Prefilled,
    continuations: Sequence[Continuation],
    advance: Callable[[int], None] = lambda _: None,
) -> Continued:
    """Log-probabilities of ``model`` after every continuation, each from the same filled cache.

    Args:
        model: in the dtype of ``prefilled``.
        kind: of cache.
        prefilled: the text.
        continuations: what follows; ``prefilled.references`` belong to these.
        advance: called with 1 after every continuation.
    """
    filled = kind.make(model.config)
    for index, (key, value) in enumerate(prefilled.layers):
        filled.update(key.clone(), value.clone(), index)
    found, cache = [], filled
    for number, continuation in enumerate(continuations, 1):
        cache = filled if number == len(continuations) else twin(filled)
        found.append(_run(model, cache, continuation))
        advance(1)
    rows = prefilled.layers[0][0].shape[2] + len(continuations[-1].tokens)
    return Continued(tuple(found), held_bytes(cache), rows)


def twin(cache: Any) -> Any:
    """A deep copy, to be continued by itself. Tensors of classes that cannot be copied, as quanto's, are shared:
    their layers exchange them and never write them."""
    held = [value for layer in cache.layers for value in vars(layer).values() if isinstance(value, torch.Tensor)]
    return copy.deepcopy(cache, {id(tensor): tensor for tensor in held if type(tensor) is not torch.Tensor})


def _run(model: Any, cache: Any, continuation: Continuation) -> torch.Tensor:
    chunks = torch.tensor([continuation.tokens]).split(CHUNK, 1)
    logits = [model(input_ids=chunk, past_key_values=cache).logits[0] for chunk in chunks]
    return torch.cat(logits)[-len(continuation.targets) :].float().log_softmax(-1)
