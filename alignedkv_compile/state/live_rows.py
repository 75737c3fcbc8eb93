"""Copies, pickles and saves of a growing cache that carry its live rows, as stock's do, and not the buffer that they lie in.

After a compiled step the tensors of a ``DynamicCache`` are views of larger buffers. ``copy.deepcopy`` and ``pickle`` (hence
``torch.save``) of a view take all of its storage along. Both ask ``copyreg`` how to take an object apart, and there the layers
of transformers' growing caches are entered.
"""

from __future__ import annotations

import copyreg
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ..errors import CacheTypeError


def compact(cache: object) -> None:
    """Give every layer of a cache contiguous tensors of its own, as stock leaves them, and release the buffers behind them.

    For what takes tensors as they lie in memory: ``safetensors``, ``tensor.view(-1)``, other libraries. The next compiled step
    copies the rows into a buffer again.

    Args:
        cache: a ``Cache`` of transformers, also one of an encoder-decoder.

    Raises:
        CacheTypeError: it has no layers.
    """
    parts = [getattr(cache, name, None) for name in ("self_attention_cache", "cross_attention_cache")]
    caches = [part for part in parts if part is not None] or [cache]
    for part in caches:
        if not isinstance(getattr(part, "layers", None), list):
            raise CacheTypeError(type(part).__name__)
        for layer in part.layers:
            vars(layer).update(_live_rows(vars(layer)))


def register_growing_layers() -> None:
    """Enter the layers of transformers' growing caches with ``copyreg``; nothing happens where transformers is not in use."""
    module = sys.modules.get("transformers.cache_utils")
    if module is None:
        return
    for kind in (module.DynamicLayer, *_subclasses(module.DynamicLayer)):
        if kind.__module__ == module.__name__ and kind not in copyreg.dispatch_table:
            copyreg.pickle(kind, _take_apart)


def _take_apart(layer: Any) -> tuple[Any, ...]:
    """What ``object.__reduce_ex__`` says, with tensors that hold their live rows only."""
    reduced: Any = object.__reduce_ex__(layer, 4)
    how, arguments, state, *rest = reduced
    if isinstance(state, dict):
        state = {**state, **_live_rows(state)}
    return how, arguments, state, *rest


def _live_rows(attributes: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Copies of those tensors that are a part of a larger storage."""
    plain = {name: value for name, value in attributes.items() if type(value) is torch.Tensor and value.layout == torch.strided}
    return {
        name: value.clone(memory_format=torch.contiguous_format)
        for name, value in plain.items()
        if value.untyped_storage().nbytes() > value.nbytes
    }


def _subclasses(kind: type) -> Iterator[type]:
    one: type
    for one in kind.__subclasses__():
        yield one
        yield from _subclasses(one)
