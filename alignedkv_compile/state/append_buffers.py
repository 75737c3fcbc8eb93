"""Growing buffers in place of ``cat([past, new])``: an append writes one row instead of copying the whole cache.

What the caller gets as the concatenated cache is a view of a buffer's live rows. The view that was handed out last may be
continued in place, once: the rows behind it are free, and no other view reaches there. Every other past is copied into a
fresh buffer: one that was already continued (a fork), that was cropped or reordered, that somebody wrote to, or that
never came from here. The values are therefore those of ``cat``, and only strides differ. One thing a fresh tensor allows
and a view does not: an in-place edit of a view also changes the older and newer views that share its rows.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from .. import torch_private
from ..arena_memory import unwritten_arena
from ..errors import CacheLengthError
from ..layout import PLANES_STALE, ArenaLayout
from .copies import MAX_CONSECUTIVE_COPIES
from .live_rows import register_growing_layers
from .stores import Builder, present
from .tensor_identity import WeakPairMap, observe
from .usage import CacheUsage

GROWTH = 1.2
"""Capacity over live rows when a buffer is made: appends then cost five copies of a row on average, however long the cache."""
SPARE_BYTES, SPARE_ROWS = 64 << 10, 128
"""But so much is free when a buffer is made, for each KV head over the whole batch, up to so many rows."""
EXCHANGED_TOO_OFTEN = (
    f"the cache was exchanged or written by other code before each of {MAX_CONSECUTIVE_COPIES} calls in a row (beam search"
    " reorders it at every token); it is copied at each call, as by torch.cat, and every bit is read"
)


@dataclass(slots=True)
class PastHistory:
    """What one graph input has met: calls in a row that found a past that had to be copied; and why planes are stale, or ""."""

    copies: int = 0
    note: str = ""


@dataclass(slots=True, weakref_slot=True)
class AppendBuffer:
    """Storage of one layer's K and V with room behind the live rows.

    Attributes:
        key: ``[B, H, C, Dk]``.
        value: ``[B, H, C, Dv]``.
        planes: uint8 arena for ``C`` rows that covers the live rows, or None.
        current: whether the planes cover the live rows; stale ones make the kernels read every bit.
        start, length: rows ``[start, length)`` are live.
        seen: the two views handed out last, as they were then.
    """

    key: torch.Tensor
    value: torch.Tensor
    planes: torch.Tensor | None
    length: int
    current: bool = True
    start: int = 0
    seen: object = None

    @property
    def capacity(self) -> int:
        """Rows that the buffer holds."""
        return self.key.shape[2]


def grown_capacity(length: int, row_bytes: int) -> int:
    """Rows of a new buffer that must hold ``length`` rows.

    Args:
        row_bytes: of a row of K and V, of one KV head of every batch entry.
    """
    spare = min(max(SPARE_BYTES // row_bytes, 1), SPARE_ROWS)
    return max(int(length * GROWTH), length + spare)


class AppendBuffers:
    """Every view that compiled code handed out last, and the buffer that it views; an entry dies with the view."""

    kind: ClassVar[str] = "dynamic"

    def __init__(self, builder: Builder) -> None:
        register_growing_layers()
        self._views: WeakPairMap[AppendBuffer] = WeakPairMap()
        self._alive: weakref.WeakValueDictionary[int, AppendBuffer] = weakref.WeakValueDictionary()
        self._builder = builder

    def __len__(self) -> int:
        return len(self._views)

    def usage(self) -> Iterator[CacheUsage]:
        """See :class:`.usage.UsageSource`. Buffers that a call is working on are in no entry; they count as well."""
        for buffer in (reference() for reference in self._alive.valuerefs()):
            if buffer is not None:
                planes = buffer.planes
                yield CacheUsage(
                    kind=self.kind,
                    address=buffer.key.data_ptr(),
                    cache_bytes=buffer.key.nbytes + buffer.value.nbytes,
                    plane_bytes=0 if planes is None else planes.nbytes,
                    copy_bytes=0,
                    rows=buffer.length - buffer.start,
                    capacity=buffer.capacity,
                )

    def before_call(
        self,
        past_key: torch.Tensor,
        past_value: torch.Tensor,
        new_rows: int,
        *,
        with_planes: bool,
        any_start: bool = False,
        history: PastHistory | None = None,
    ) -> AppendBuffer:
        """A buffer whose live rows are the past's and which has room for ``new_rows`` more.

        The past loses its claim on the buffer: whoever continues it again gets a copy, also while the call is under way and
        when it fails.

        Args:
            past_key: ``[B, H, L, Dk]``.
            past_value: ``[B, H, L, Dv]``, same dtype.
            new_rows: rows that the call appends.
            with_planes: whether the graph reads and writes planes.
            any_start: whether the live rows may begin behind the buffer's first.
            history: what the same graph input met at the calls before.

        Raises:
            CacheLengthError: the two pasts have different lengths.
        """
        length = past_key.shape[2]
        if past_value.shape[2] != length:
            raise CacheLengthError(length, past_value.shape[2])
        history = PastHistory() if history is None else history
        buffer = self._views.pop(past_key, past_value)
        known = buffer is not None and buffer.seen == observe(past_key, past_value)
        history.copies = 0 if known else history.copies + 1
        if buffer is None or not known or buffer.length + new_rows > buffer.capacity or (buffer.start > 0 and not any_start):
            buffer = self._copy(past_key, past_value, length + new_rows)
        if not with_planes:
            buffer.planes = None  # the graph does not keep them up
        elif history.copies > MAX_CONSECUTIVE_COPIES:
            history.note = EXCHANGED_TOO_OFTEN
            buffer.planes, buffer.current = self._arena(buffer), False
        elif buffer.planes is None or not buffer.current:
            history.note = ""
            buffer.planes, buffer.current = self._arena(buffer), True
            self._builder.rebuild(buffer.planes, buffer.key, buffer.value, buffer.length)
        return buffer

    def after_call(self, buffer: AppendBuffer, new_rows: int, keep: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of the live rows, ``new_rows`` more than before; they may be continued in place.

        Args:
            keep: at most so many rows stay live, the last ones.

        Returns:
            ``[B, H, L, Dk]`` and ``[B, H, L, Dv]``.
        """
        buffer.length += new_rows
        if keep is not None:
            buffer.start = max(buffer.start, buffer.length - keep)
        live = buffer.length - buffer.start
        key_view, value_view = self.rows(buffer, buffer.start, live)
        buffer.seen = observe(key_view, value_view)
        self._views.set(key_view, value_view, buffer)
        return key_view, value_view

    def beside(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The buffer that a pair of views belongs to, and its planes."""
        buffer = self._views.get(key, value)
        return () if buffer is None else present(buffer.key, buffer.value, buffer.planes)

    def with_capacity(
        self, past_key: torch.Tensor, past_value: torch.Tensor, capacity: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of a new buffer that begins with the past's rows."""
        return with_room(past_key, capacity), with_room(past_value, capacity)

    def rows(self, buffer: AppendBuffer, start: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of a buffer's rows ``[start, start + count)``, in the form in which a past comes."""
        return buffer.key.narrow(2, start, count), buffer.value.narrow(2, start, count)

    def _copy(self, past_key: torch.Tensor, past_value: torch.Tensor, rows: int) -> AppendBuffer:
        length, (batch, _, _, key_dim) = past_key.shape[2], past_key.shape
        capacity = grown_capacity(rows, batch * (key_dim + past_value.shape[3]) * past_key.element_size())
        with torch_private.normal_tensors():
            key, value = self.with_capacity(past_key, past_value, capacity)
        buffer = AppendBuffer(key, value, None, length)
        self._alive[id(buffer)] = buffer
        return buffer

    def _arena(self, buffer: AppendBuffer) -> torch.Tensor:
        """Stale planes for a buffer."""
        batch, heads, capacity, key_dim = buffer.key.shape
        total = ArenaLayout(batch * heads, capacity, key_dim, buffer.value.shape[-1]).total
        with torch_private.normal_tensors():
            planes = unwritten_arena(total, buffer.key.device)
            planes[:8].view(torch.int64).fill_(PLANES_STALE)
        return planes


def with_room(past: torch.Tensor, capacity: int) -> torch.Tensor:
    """A copy ``[B, H, capacity, D]`` of a past ``[B, H, L, D]``."""
    batch, heads, length, width = past.shape
    buffer = past.new_empty(batch, heads, capacity, width)
    buffer[:, :, :length].copy_(past)
    buffer[:, :, length:].zero_()  # the graph may read whole blocks; what lies there must at least be numbers
    return buffer
