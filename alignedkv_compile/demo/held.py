"""How much memory a cache takes: its own tensors, the buffers that they view, and the planes beside them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ..runtime import STORES
from ..state.stores import Stores


def held_bytes(cache: Any, stores: Stores = STORES) -> int:
    """Bytes of every storage that a cache of ``transformers`` keeps alive, each counted once.

    A view counts as all of the buffer that it belongs to, and a cache that compiled code has met with what stands beside it.

    Args:
        cache: its layers have ``keys`` and ``values``, or other tensors.
        stores: where to look for what stands beside it.
    """
    storages = {storage.data_ptr(): storage.nbytes() for storage in (t.untyped_storage() for t in _tensors(cache, stores))}
    return sum(storages.values())


def _tensors(cache: Any, stores: Stores) -> Iterator[torch.Tensor]:
    for layer in cache.layers:
        yield from (value for value in vars(layer).values() if isinstance(value, torch.Tensor))
        key, value = getattr(layer, "keys", None), getattr(layer, "values", None)
        if isinstance(key, torch.Tensor) and isinstance(value, torch.Tensor):
            yield from stores.beside(key, value)
