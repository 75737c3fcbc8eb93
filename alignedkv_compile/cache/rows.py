"""Rows into an arena and out of it, outside of compiled code: many at once go through the code that Inductor generates."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable

import torch

from .. import torch_private
from ..ops import load_rows, store_rows
from ..own_kernels import Function, OwnKernels, compile_alone

_log = logging.getLogger(__name__)

COMPILED_ROWS = 2048
"""From so many rows of all heads on, compiling once (some seconds for each shape) is worth it."""


def store(
    planes: torch.Tensor, key: torch.Tensor, value: torch.Tensor, positions: torch.Tensor, capacity: int, storage: str
) -> None:
    """What :data:`alignedkv_compile.ops.store_rows` does."""
    if torch.compiler.is_compiling() or not _worthwhile(planes, key, key.shape[2]):
        store_rows.default(planes, key, value, positions, capacity, storage)
        return
    room = planes.new_empty(capacity, 0)
    args = (planes, key.contiguous(), value.contiguous(), positions, room)
    if _KERNELS.call(_store, storage, args) is None:
        store_rows.default(planes, key, value, positions, capacity, storage)


def load(
    planes: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    positions: torch.Tensor,
    rows: int,
    capacity: int,
    storage: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What :data:`alignedkv_compile.ops.load_rows` does."""
    if torch.compiler.is_compiling() or not _worthwhile(planes, key, rows):
        return load_rows.default(planes, key, value, positions, rows, capacity, storage)
    room, live = planes.new_empty(capacity, 0), planes.new_empty(rows, 0)
    args = (planes, key.contiguous(), value.contiguous(), positions, room, live)
    held = _KERNELS.call(_load, storage, args)
    if held is None:
        return load_rows.default(planes, key, value, positions, rows, capacity, storage)
    return held[0], held[1]


def _worthwhile(planes: torch.Tensor, key: torch.Tensor, rows: int) -> bool:
    plain = type(planes) is torch.Tensor and type(key) is torch.Tensor
    return plain and planes.device.type == "cpu" and key.shape[0] * key.shape[1] * rows >= COMPILED_ROWS


def _store(storage: str) -> Function:
    def function(
        planes: torch.Tensor, key: torch.Tensor, value: torch.Tensor, positions: torch.Tensor, room: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        store_rows.default(planes, key, value, positions, room.shape[0], storage)
        return ()

    return function


def _load(storage: str) -> Function:
    def function(
        planes: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        positions: torch.Tensor,
        room: torch.Tensor,
        live: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        held = load_rows.default(planes, key, value, positions, live.shape[0], room.shape[0], storage)
        return held[0], held[1]

    return function


class Kernels:
    """Compiles each function once per storage, dtype and head shape; rows and capacity stay symbolic."""

    def __init__(self) -> None:
        self._kernels = OwnKernels()
        self._broken: set[Hashable] = set()

    def call(
        self, function: Callable[[str], Function], storage: str, args: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, ...] | None:
        """What ``function(storage)(*args)`` returns, or None where that cannot be compiled: said once, in a warning."""
        _, key, value, *_ = args
        kind = (function, storage, key.dtype, key.shape[1], key.shape[3], value.shape[3])
        if kind in self._broken:
            return None
        with torch_private.normal_tensors():
            try:
                kernel = self._kernel(function, storage, args)
            except Exception as error:  # whatever a compiler may fail with
                self._broken.add(kind)
                dims = f"{key.shape[1]} heads, {key.shape[3]} and {value.shape[3]} dimensions"
                what = f"rows of a {storage} cache ({key.dtype}, {dims})"
                _log.warning("%s are handled by slow eager code, no kernel could be compiled: %s", what, error)
                return None
            return tuple(kernel(*args))  # type: ignore[arg-type]

    def _kernel(
        self, function: Callable[[str], Function], storage: str, args: tuple[torch.Tensor, ...]
    ) -> torch_private.GuardedGraph:
        _, key, value, positions, *extents = args
        specialised = (min(key.shape[2], 2), min(positions.shape[0], 2), *(min(extent.shape[0], 2) for extent in extents))
        signature: Hashable = (function, storage, key.dtype, key.shape[:2], key.shape[3], value.shape[3], specialised)
        dynamic = ((0,), (2,), (2,), (0,), *((0,) for _ in extents))
        return self._kernels.get(signature, lambda: compile_alone(function(storage), args, dynamic, storage), args)


_KERNELS = Kernels()
