"""Sliding windows beside caches that are shifted by one row at every step: rows are appended behind the window instead.

A full ``StaticSlidingWindowLayer`` moves every row down by one place at every token. Planes cannot follow that: a row's dither
and its block's sum belong to its place. So a window's rows are kept once more, in a buffer with room behind them, where a step
writes one row and the window moves on. Only when the room is used up do the rows move, from the cache itself, to the front.

The model's cache stays authoritative: as with planes beside static caches, whatever is not as the last call left it is copied
anew.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from .. import torch_private
from ..arena_memory import zeroed_arena
from ..layout import PLANES_STALE, arena_layout, padded_rows
from .copies import CopyHistory, Look
from .stores import Builder, present
from .tensor_identity import WeakPairMap
from .usage import CacheUsage


def window_capacity(rows: int) -> int:
    """Rows of the buffer for a window of ``rows`` rows: half as many again, so that a step copies two rows on average."""
    return padded_rows(rows + rows // 2 + 1)


@dataclass(slots=True, weakref_slot=True)
class Window:
    """Storage of one layer's window with room behind it.

    Attributes:
        key: ``[B, H, C, Dk]``; rows ``[end - W, end)`` are those of the cache ``[B, H, W, Dk]``.
        value: ``[B, H, C, Dv]``.
        planes: uint8 arena for ``C`` rows, or None.
        position: int64 ``[1]``, holds ``end`` for the graph.
        rows: ``W``.
        address: of the cache, when the window was made.
        end: as above.
        history: whether the cache is as the last call left it.
        note: why the planes are stale, or "".
    """

    key: torch.Tensor
    value: torch.Tensor
    planes: torch.Tensor | None
    position: torch.Tensor
    rows: int
    address: int
    end: int = 0
    history: CopyHistory = field(default_factory=CopyHistory)
    note: str = ""

    def move_to(self, end: int) -> None:
        """Say where the window ends now."""
        self.end = end
        with torch_private.normal_tensors():
            self.position.fill_(end)


class Windows:
    """Every pair of shifted cache tensors that compiled code has met, and its window; an entry dies with either tensor."""

    def __init__(self, builder: Builder) -> None:
        self._windows: WeakPairMap[Window] = WeakPairMap()
        self._alive: weakref.WeakValueDictionary[int, Window] = weakref.WeakValueDictionary()
        self._builder = builder

    def __len__(self) -> int:
        return len(self._windows)

    def usage(self) -> Iterator[CacheUsage]:
        """See :class:`.usage.UsageSource`. Windows that a call is working on are in no entry; they count as well."""
        for window in (reference() for reference in self._alive.valuerefs()):
            if window is not None:
                copies = window.key.nbytes + window.value.nbytes
                yield CacheUsage(
                    kind="window",
                    address=window.address,
                    cache_bytes=copies // window.key.shape[2] * window.rows,
                    plane_bytes=0 if window.planes is None else window.planes.nbytes,
                    copy_bytes=copies,
                    rows=window.rows,
                    capacity=window.rows,
                )

    def before_call(
        self, key: torch.Tensor, value: torch.Tensor, new_rows: int, *, with_planes: bool, trust_unversioned: bool
    ) -> Window:
        """The window over a pair of caches, as they are now, with room for ``new_rows`` more rows.

        Args:
            key: ``[B, H, W, Dk]``.
            value: ``[B, H, W, Dv]``, same dtype.
            new_rows: rows by which the call shifts the cache.
            with_planes: whether the graph reads and writes planes.
            trust_unversioned: take inference-mode tensors to be written by compiled code only.
        """
        capacity = window_capacity(key.shape[2])
        window = self._windows.pop(key, value)  # filed again when the call has succeeded
        if window is None or window.key.shape[2] != capacity or (window.planes is None) == with_planes:
            window = self._create(key, value, capacity, with_planes)
        found = window.history.look(key, value, trust_unversioned=trust_unversioned)
        if found is not Look.SAME or window.end + new_rows > capacity:
            self._copy(window, key, value, with_planes=found is not Look.CHANGED_AGAIN)
            window.note = window.history.note if with_planes and found is Look.CHANGED_AGAIN else ""
        return window

    def after_call(self, window: Window, key: torch.Tensor, value: torch.Tensor, new_rows: int) -> None:
        """Remember the cache as the call left it, ``new_rows`` further on."""
        window.move_to(window.end + new_rows)
        window.history.remember(key, value)
        self._windows.set(key, value, window)

    def beside(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The window's rows and planes."""
        window = self._windows.get(key, value)
        return () if window is None else present(window.key, window.value, window.planes)

    def _create(self, key: torch.Tensor, value: torch.Tensor, capacity: int, with_planes: bool) -> Window:
        with torch_private.normal_tensors():
            buffers = [cache.new_zeros(*cache.shape[:2], capacity, cache.shape[3]) for cache in (key, value)]
            planes = None
            if with_planes:
                planes = zeroed_arena(arena_layout(*buffers).total, key.device)
            position = torch.zeros(1, dtype=torch.int64, device=key.device)
        window = Window(buffers[0], buffers[1], planes, position, key.shape[2], key.data_ptr())
        self._alive[id(window)] = window
        return window

    def _copy(self, window: Window, key: torch.Tensor, value: torch.Tensor, *, with_planes: bool) -> None:
        rows = key.shape[2]
        with torch_private.normal_tensors():
            window.key[:, :, :rows].copy_(key)
            window.value[:, :, :rows].copy_(value)
        window.move_to(rows)
        if window.planes is None:
            return
        if with_planes:
            self._builder.rebuild(window.planes, window.key, window.value, rows)
        else:
            with torch_private.normal_tensors():
                window.planes[:8].view(torch.int64).fill_(PLANES_STALE)
