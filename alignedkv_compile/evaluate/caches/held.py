"""How many bytes a cache holds: those of the tensors that it keeps alive, not of a formula."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

_LEAVES = (str, bytes, int, float, complex, bool, type(None), type, torch.dtype, torch.device, torch.nn.Module)


def held_bytes(cache: Any) -> int:
    """Bytes of every storage that is reachable from ``cache``, each counted once and whole, spare room included.

    Follows attributes, lists, tuples, sets and dicts, and the inner tensors of tensor subclasses, such as quanto's.
    """
    sizes = {storage.data_ptr(): storage.nbytes() for storage in _storages(cache, set())}
    return sum(sizes.values())


def _storages(value: Any, seen: set[int]) -> Iterator[torch.UntypedStorage]:
    if isinstance(value, _LEAVES) or id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        if hasattr(value, "__tensor_flatten__"):
            for name in value.__tensor_flatten__()[0]:
                yield from _storages(getattr(value, name), seen)
        elif value.device.type != "meta":
            yield value.untyped_storage()
        return
    if isinstance(value, dict):
        parts = list(value.values())
    elif isinstance(value, (list, tuple, set, frozenset)):
        parts = list(value)
    else:
        parts = list(getattr(value, "__dict__", {}).values())
    for part in parts:
        yield from _storages(part, seen)
