"""Bytes that a cache of so many rows holds, by the way in which it is stored.

No byte is computed from a formula of this module's own: every way makes its cache as always, on the ``meta`` device, by the
classes that allocate it (``transformers``' layers, :class:`alignedkv_compile.Cache`) or by the layout and the rules of growth
that the run-time state allocates by, and the sizes of the tensors are added up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ..layout import ArenaLayout, arena_layout
from ..state.append_buffers import grown_capacity
from ..state.windows import window_capacity
from ..storage import PACKED
from .shapes import LayerShape, ModelShape, state_tensors


@dataclass(frozen=True)
class StorageKind:
    """A way to store a cache.

    Attributes:
        name: what tables call it.
        held: bytes of a cache for ``rows`` rows of every sequence, of a given model.
        what: a few words on it.
    """

    name: str
    held: Callable[[ModelShape, int], int]
    what: str


def static_cache(model: ModelShape, rows: int) -> Any:
    """A ``StaticCache`` with room for ``rows`` rows, on the device of the model's shapes."""
    from transformers import StaticCache

    return _initialized(StaticCache(config=model.config, max_cache_len=rows), model)


def packed_cache(model: ModelShape, mode: str, rows: int) -> Any:
    """An :class:`alignedkv_compile.Cache` with room for ``rows`` rows, likewise."""
    from ..cache import Cache

    return _initialized(Cache(model.config, mode, rows), model)


def dynamic_cache(model: ModelShape, rows: int) -> Any:
    """A ``DynamicCache`` that has grown to ``rows`` rows, the last one at a decode step."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    for layer, shape in zip(cache.layers, model.layers, strict=True):
        if shape.key is None or shape.value is None:
            continue
        before = rows - 1
        if layer.is_sliding:  # more rows than a window would leave a view of all of them
            before = min(before, layer.sliding_window - 1)
        for count in (before, 1):
            if count:
                layer.update(
                    *(tensor.new_empty(*tensor.shape[:2], count, tensor.shape[3]) for tensor in (shape.key, shape.value))
                )
    return cache


def tensor_bytes(cache: Any) -> int:
    """Bytes of the tensors that the layers of ``cache`` hold."""
    return sum(tensor.untyped_storage().nbytes() for layer in cache.layers for tensor in _tensors(layer))


def _tensors(layer: Any) -> Iterator[torch.Tensor]:
    yield from (value for value in vars(layer).values() if isinstance(value, torch.Tensor))
    yield from state_tensors(layer)


def _initialized(cache: Any, model: ModelShape) -> Any:
    for layer, shape in zip(cache.layers, model.layers, strict=True):
        if shape.key is not None:
            layer.lazy_initialization(shape.key, shape.value)
    return cache


def _constant(model: ModelShape) -> int:
    """States of linear attention, which the caches above have not been given."""
    return sum(shape.constant for shape in model.layers)


def _static(model: ModelShape, rows: int) -> int:
    return tensor_bytes(static_cache(model, rows)) + _constant(model)


def _dynamic(model: ModelShape, rows: int) -> int:
    return tensor_bytes(dynamic_cache(model, rows)) + _constant(model)


def _packed(mode: str) -> Callable[[ModelShape, int], int]:
    return lambda model, rows: tensor_bytes(packed_cache(model, mode, rows)) + _constant(model)


def _beside_static(model: ModelShape, rows: int) -> int:
    """The cache, and what the run-time state keeps beside it: planes, and for windows and latents the rows once more."""
    cache = static_cache(model, rows)
    held = tensor_bytes(cache) + _constant(model)
    for layer, shape in zip(cache.layers, model.layers, strict=True):
        if shape.key is None:
            continue
        key, value = layer.keys, layer.values
        if layer.is_sliding:
            room = window_capacity(key.shape[2])
            key, value = (tensor.new_empty(*tensor.shape[:2], room, tensor.shape[3]) for tensor in (key, value))
            held += key.nbytes + value.nbytes
        elif _is_latent(model, shape):
            key, value = torch.cat((key, value), -1), key
            held += key.nbytes
        held += arena_layout(key, value).total
    return held


def _beside_dynamic(model: ModelShape, rows: int) -> int:
    """Buffers with room to grow in place of the cache's tensors, which view them, and planes."""
    held = _constant(model)
    for layer, shape in zip(dynamic_cache(model, rows).layers, model.layers, strict=True):
        if shape.key is None or shape.value is None:
            continue
        batch, heads, _, key_dim = shape.key.shape
        value_dim, size = shape.value.shape[3], shape.key.element_size()
        live = min(rows, layer.sliding_window) if layer.is_sliding else rows
        capacity = grown_capacity(live, batch * (key_dim + value_dim) * size)
        if _is_latent(model, shape):
            key_dim, value_dim = key_dim + value_dim, key_dim
        held += batch * heads * capacity * (key_dim + value_dim) * size
        held += ArenaLayout(batch * heads, capacity, key_dim, value_dim).total
    return held


def _is_latent(model: ModelShape, shape: LayerShape) -> bool:
    """Whether a layer caches latents and rope keys (multi-head latent attention), which are read side by side."""
    rank = getattr(model.config, "kv_lora_rank", None)
    return rank is not None and shape.key is not None and shape.key.shape[3] == rank


STATIC, DYNAMIC = "StaticCache", "DynamicCache"
BESIDE_STATIC, BESIDE_DYNAMIC = "planes beside StaticCache", "planes beside DynamicCache"

STORAGE_KINDS: tuple[StorageKind, ...] = (
    StorageKind(STATIC, _static, "stock"),
    StorageKind(DYNAMIC, _dynamic, "stock; the copy that each token makes of a layer is not counted"),
    StorageKind(BESIDE_STATIC, _beside_static, 'backend="alignedkv" with a StaticCache'),
    StorageKind(BESIDE_DYNAMIC, _beside_dynamic, 'backend="alignedkv" with a DynamicCache, its buffers just grown'),
    *(StorageKind(mode, _packed(mode), f'alignedkv_compile.Cache(config, "{mode}", max_cache_len)') for mode in PACKED),
)
"""Every way, stock first."""
