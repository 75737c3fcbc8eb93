"""Planes beside static caches: found from the cache tensor at each call, trusted only while nobody else wrote the tensor.

The model's own K and V tensors stay authoritative. Before a call, the tensors' version counters, addresses and shapes are
compared with what was recorded after the last call that kept the planes: equal means that the planes are current,
anything else means that somebody else wrote (an eager prefill, ``reset()``, a user's edit) and the planes are rebuilt,
or, when that cannot be or does not pay, marked stale, upon which the kernels read every bit of the tensors themselves.

Two blind spots, both torch's: a write through ``.data`` counts no version, and a tensor made under
``torch.inference_mode()`` has no counter at all (such tensors are therefore always stale, unless
``assume_exclusive_cache``).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .. import torch_private
from ..arena_memory import zeroed_arena
from ..layout import PLANES_STALE, SCALES_BYTES, arena_layout
from .stores import Builder
from .tensor_identity import WeakPairMap, observe
from .usage import CacheUsage

_log = logging.getLogger(__name__)

MAX_CONSECUTIVE_REBUILDS = 4
"""So many calls in a row may rebuild a tensor's planes; then somebody evidently writes it between all calls."""
STALE_CALLS = 64
"""For so many calls the planes then stay stale, before one rebuild is tried again."""

NO_VERSION_COUNTER = (
    "the cache was allocated under torch.inference_mode(): such tensors count no versions, so a write by anybody else would go"
    " unseen; every bit is read (allocate the cache under torch.no_grad(), or set assume_exclusive_cache)"
)
REBUILT_TOO_OFTEN = (
    f"the cache was written by other code before each of {MAX_CONSECUTIVE_REBUILDS} calls in a row; every bit is read for"
    f" {STALE_CALLS} calls before its planes are rebuilt again"
)
REBUILD_FAILED = "rebuilding the planes failed, every bit is read: "


@dataclass(slots=True)
class RebuildHistory:
    """How often the memory at one address had to be looked at anew; outlives the tensor objects that view it.

    Attributes:
        address: ``data_ptr()`` of the K tensor.
        rebuilds: calls in a row that found the tensors changed.
        stale_calls: calls left for which the planes are not rebuilt.
        stale_reason: why the planes are stale although a call is under way, or "".
    """

    address: int
    rebuilds: int = 0
    stale_calls: int = 0
    stale_reason: str = ""


class Sidecar:
    """The plane arena of one pair of cache tensors, and how it stands with them.

    Attributes:
        planes: uint8 arena for the pair, see :mod:`alignedkv_compile.layout`.
        valid: what the arena's header says.
        versioned: whether the tensors count versions.
        history: rebuilds so far.
    """

    __slots__ = ("_seen", "history", "planes", "valid", "versioned")

    def __init__(self, key: torch.Tensor, value: torch.Tensor, history: RebuildHistory) -> None:
        self.planes = _empty_arena(key, value)
        self.valid = False
        self.versioned = not (key.is_inference() or value.is_inference())
        self.history = history
        self._seen: object = None

    def is_current(self, key: torch.Tensor, value: torch.Tensor) -> bool:
        """Whether the tensors are as :meth:`record` last saw them."""
        return self.valid and self.was_seen(key, value)

    def was_seen(self, key: torch.Tensor, value: torch.Tensor) -> bool:
        """The same, whether or not the planes were kept up with the tensors."""
        return self._seen == observe(key, value, self.versioned)

    def record(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Remember the tensors as a call left them, the planes having been kept up with them."""
        self._seen = observe(key, value, self.versioned)

    def mark_stale(self) -> None:
        """The planes may differ from the tensors: every bit of the tensors is read until the planes are rebuilt."""
        if self.valid:
            self.valid = False
            with torch_private.normal_tensors():
                self.planes[:8].view(torch.int64).fill_(PLANES_STALE)

    def rebuild(self, key: torch.Tensor, value: torch.Tensor, builder: Builder) -> None:
        """Write the planes of all rows; the arena is renewed if ``tensor.data`` was exchanged for another size or device."""
        self.mark_stale()
        if self.planes.numel() != arena_layout(key, value).total or self.planes.device != key.device:
            self.planes = _empty_arena(key, value)
        builder.rebuild(self.planes, key, value, key.shape[2])
        self.valid = True


def _written_rows(planes: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> int | None:
    """Rows of the first head that hold anything but zeros; waits for the device. None when the arena is of another size."""
    layout, rows = arena_layout(key, value), key.shape[2]
    if planes.numel() != layout.total:
        return None
    headers = planes[layout.scales : layout.scales + rows * SCALES_BYTES].view(torch.int32)
    return int(headers.count_nonzero())


def _empty_arena(key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """All zero, hence stale."""
    with torch_private.normal_tensors():
        return zeroed_arena(arena_layout(key, value).total, key.device)


class SidecarStore:
    """Every pair of static cache tensors in the process that compiled code has met, and its planes.

    An entry dies with either tensor. Several threads may decode several models at once; as with any tensor, two threads must
    not write the same cache at the same time.
    """

    def __init__(self, builder: Builder) -> None:
        self._pairs: WeakPairMap[Sidecar] = WeakPairMap()
        self._builder = builder
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._pairs)

    def usage(self) -> Iterator[CacheUsage]:
        """See :class:`.usage.UsageSource`. A row counts as live when it holds anything but zeros, and its planes are kept."""
        for key, value, sidecar in self._pairs.items():
            planes = sidecar.planes
            yield CacheUsage(
                kind="static",
                address=key.data_ptr(),
                cache_bytes=key.nbytes + value.nbytes,
                plane_bytes=planes.nbytes,
                copy_bytes=0,
                rows=_written_rows(planes, key, value) if sidecar.valid else None,
                capacity=key.shape[2],
            )

    def before_call(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        previous: RebuildHistory | None = None,
        *,
        trust_unversioned: bool = False,
    ) -> Sidecar:
        """The pair's planes, current or marked stale.

        Args:
            key: ``[B, H, C, Dk]``.
            value: ``[B, H, C, Dv]``, same dtype.
            previous: history of what the same graph input got at the last call: a caller that passes a new view of the
                same memory each time, or a new tensor in place of the last one (beam search reorders the cache so), is
                recognised by it as one that rebuilds each time.
            trust_unversioned: take inference-mode tensors to be written by compiled code only.
        """
        sidecar = self._pairs.get(key, value)
        if sidecar is None:
            sidecar = self._create(key, value, previous)
        if not sidecar.versioned and not trust_unversioned:
            sidecar.mark_stale()
            sidecar.history.stale_reason = NO_VERSION_COUNTER
        elif sidecar.is_current(key, value):
            sidecar.history.rebuilds = 0
        else:
            self._refresh(sidecar, key, value)
        return sidecar

    def before_read(self, key: torch.Tensor, value: torch.Tensor, *, trust_unversioned: bool = False) -> Sidecar:
        """The planes of a pair that nobody is expected to write: stale until the pair comes, unchanged, for a second time.

        Args:
            key, value, trust_unversioned: as :meth:`before_call` takes them.
        """
        sidecar = self._pairs.get(key, value)
        if sidecar is None:
            sidecar = self._create(key, value, None)
            sidecar.record(key, value)
        elif not sidecar.versioned and not trust_unversioned:
            sidecar.mark_stale()
            sidecar.history.stale_reason = NO_VERSION_COUNTER
        elif not sidecar.was_seen(key, value):
            sidecar.mark_stale()
            sidecar.record(key, value)
        elif sidecar.valid:
            sidecar.history.rebuilds = 0
        else:
            self._refresh(sidecar, key, value)
            sidecar.record(key, value)
        return sidecar

    def beside(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The pair's planes, if there are any."""
        sidecar = self._pairs.get(key, value)
        return () if sidecar is None else (sidecar.planes,)

    def _is_alive(self, history: RebuildHistory) -> bool:
        """Whether the tensors that a history is about still exist."""
        return any(sidecar.history is history for sidecar in self._pairs)

    def _create(self, key: torch.Tensor, value: torch.Tensor, previous: RebuildHistory | None) -> Sidecar:
        with self._lock:
            sidecar = self._pairs.get(key, value)
            if sidecar is None:
                address = key.data_ptr()
                history = RebuildHistory(address)
                if previous is not None and (previous.address == address or not self._is_alive(previous)):
                    history = previous
                    history.address = address
                sidecar = Sidecar(key, value, history)
                self._pairs.set(key, value, sidecar)
        return sidecar

    def _refresh(self, sidecar: Sidecar, key: torch.Tensor, value: torch.Tensor) -> None:
        history = sidecar.history
        if history.stale_calls > 1:
            history.stale_calls -= 1
            return
        if history.stale_calls == 0 and history.rebuilds >= MAX_CONSECUTIVE_REBUILDS:
            sidecar.mark_stale()
            history.stale_calls = STALE_CALLS
            history.stale_reason = REBUILT_TOO_OFTEN
            return
        history.stale_calls = 0
        history.stale_reason = ""
        history.rebuilds += 1
        try:
            sidecar.rebuild(key, value, self._builder)
        except Exception as error:
            history.stale_calls = STALE_CALLS
            history.stale_reason = f"{REBUILD_FAILED}{type(error).__name__}: {error}"
            _log.warning("%s", history.stale_reason, exc_info=True)
