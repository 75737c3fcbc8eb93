"""A text that has been read once: its K and V, and what the fp32 model expects after it. Every kind of cache starts from these.

The prefill is the costly part, and the same for all kinds: an fp32 copy of the model with stock attention. K and V are then
rounded to the dtype of the model under test, so that all kinds store the very same rows. Prefills can be kept in a folder, as
files named by a hash of everything that they depend on.
"""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

CHUNK = 1024
"""Tokens per forward pass of the prefill."""


@dataclass(frozen=True)
class Continuation:
    """Tokens that follow a text, and which of the model's predictions count.

    Attributes:
        tokens: what the model is given after the text.
        targets: the tokens that are right after each of the last ``len(targets)`` of ``tokens``.
    """

    tokens: tuple[int, ...]
    targets: tuple[int, ...]


@dataclass(frozen=True)
class Prefilled:
    """A text that has been read.

    Attributes:
        layers: K ``[1, H, N, Dk]`` and V ``[1, H, N, Dv]`` of every layer, in the dtype of the model under test.
        references: for every continuation float32 ``[len(targets), vocabulary]``, log-probabilities of the fp32 model.
    """

    layers: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    references: tuple[torch.Tensor, ...]


class Reader:
    """Prefills with an fp32 copy of a model.

    Args:
        model: the model under test; its weights are cast up exactly, so both compute with the same numbers.
        folder: where prefills are kept and looked for, or None.
    """

    def __init__(self, model: Any, folder: Path | None = None) -> None:
        self._reference = copy.deepcopy(model).float()
        self._dtype = model.dtype
        self._folder = folder
        self._weights = _fingerprint(model)

    @property
    def model(self) -> Any:
        """The fp32 copy."""
        return self._reference

    @torch.no_grad()
    def read(
        self, tokens: Sequence[int], continuations: Sequence[Continuation], advance: Callable[[int], None] = lambda _: None
    ) -> Prefilled:
        """Read ``tokens``, then every continuation after them.

        Args:
            tokens: the text.
            continuations: each starts after the text, not after another.
            advance: called with the number of tokens that have been read.
        """
        path = self._path(tokens, continuations)
        if path is not None and path.is_file():
            advance(len(tokens))
            saved = torch.load(path, mmap=True)
            return Prefilled(tuple(saved["layers"]), tuple(saved["references"]))
        found = self._compute(tokens, continuations, advance)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(f".{os.getpid()}")
            torch.save({"layers": list(found.layers), "references": list(found.references)}, partial)
            partial.replace(path)
        return found

    def _compute(
        self, tokens: Sequence[int], continuations: Sequence[Continuation], advance: Callable[[int], None]
    ) -> Prefilled:
        from transformers import DynamicCache

        cache = DynamicCache(config=self._reference.config)
        text = torch.tensor([tuple(tokens)])
        for start in range(0, text.shape[1], CHUNK):
            chunk = text[:, start : start + CHUNK]
            self._reference(input_ids=chunk, past_key_values=cache, logits_to_keep=1)
            advance(chunk.shape[1])
        layers = [(layer.keys, layer.values) for layer in cache.layers]
        references = []
        for continuation in continuations:
            for layer, (key, value) in zip(cache.layers, layers, strict=True):
                layer.keys, layer.values = key, value
            scored = len(continuation.targets)
            following = torch.tensor([continuation.tokens])
            logits = self._reference(input_ids=following, past_key_values=cache, logits_to_keep=scored).logits
            references.append(logits[0].log_softmax(-1))
        rounded = tuple((key.to(self._dtype), value.to(self._dtype)) for key, value in layers)
        return Prefilled(rounded, tuple(references))

    def _path(self, tokens: Sequence[int], continuations: Sequence[Continuation]) -> Path | None:
        if self._folder is None:
            return None
        rope = getattr(self._reference.config, "rope_parameters", None)
        parts = (self._weights, str(self._dtype), repr(rope), repr(tuple(tokens)), repr(tuple(continuations)))
        return self._folder / f"{hashlib.sha256('|'.join(parts).encode()).hexdigest()[:32]}.pt"


def _fingerprint(model: Any) -> str:
    """A hash of a model's weights, through sums that another order or another number changes."""
    sums = [
        f"{name} {float(weight.double().sum())!r} {float(weight.flatten()[-1])!r}" for name, weight in model.named_parameters()
    ]
    return hashlib.sha256("\n".join(sums).encode()).hexdigest()
