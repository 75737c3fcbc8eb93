"""Latents and rope keys side by side, beside caches that hold them in two tensors.

Multi-head latent attention caches a latent and a rope key per token, in two tensors; a read wants both in one row. So the
rows are kept once more, in one tensor, to which a step adds a row.

A static cache stays authoritative: as with planes beside static caches, whatever is not as the last call left it is copied
anew (:class:`JoinedKeys`). A growing cache lives in the buffers (:class:`LatentBuffers`).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from .. import torch_private
from ..arena_memory import zeroed_arena
from ..layout import PLANES_STALE, arena_layout
from .append_buffers import AppendBuffer, AppendBuffers, with_room
from .copies import CopyHistory, Look
from .stores import Builder, present
from .tensor_identity import WeakPairMap
from .usage import CacheUsage


@dataclass(slots=True, weakref_slot=True)
class Joined:
    """One layer's latents and rope keys.

    Attributes:
        rows: ``[B, 1, C, R + Dr]``.
        planes: uint8 arena for ``rows`` as K and the latents as V, or None.
        address: of the latents, when the rows were joined.
        current: whether the planes are those of the rows.
        history: whether the cache is as the last call left it.
        note: why the planes are stale, or "".
    """

    rows: torch.Tensor
    planes: torch.Tensor | None
    address: int
    current: bool = False
    history: CopyHistory = field(default_factory=CopyHistory)
    note: str = ""


class JoinedKeys:
    """Every pair of latent and rope caches that compiled code has met, and its joined rows; an entry dies with either."""

    def __init__(self, builder: Builder) -> None:
        self._joined: WeakPairMap[Joined] = WeakPairMap()
        self._alive: weakref.WeakValueDictionary[int, Joined] = weakref.WeakValueDictionary()
        self._builder = builder

    def __len__(self) -> int:
        return len(self._joined)

    def usage(self) -> Iterator[CacheUsage]:
        """See :class:`.usage.UsageSource`. How many rows are live is not known here."""
        for joined in (reference() for reference in self._alive.valuerefs()):
            if joined is not None:
                yield CacheUsage(
                    kind="latent",
                    address=joined.address,
                    cache_bytes=joined.rows.nbytes,
                    plane_bytes=0 if joined.planes is None else joined.planes.nbytes,
                    copy_bytes=joined.rows.nbytes,
                    rows=None,
                    capacity=joined.rows.shape[2],
                )

    def before_call(self, latent: torch.Tensor, rope: torch.Tensor, *, with_planes: bool, trust_unversioned: bool) -> Joined:
        """The joined rows of a pair of caches as they are now.

        Args:
            latent: ``[B, 1, C, R]``.
            rope: ``[B, 1, C, Dr]``, same dtype.
            with_planes: whether the graph reads and writes planes.
            trust_unversioned: take inference-mode tensors to be written by compiled code only.
        """
        joined = self._joined.pop(latent, rope)  # filed again when the call has succeeded
        if joined is None or not _fits(joined, latent, rope, with_planes=with_planes):
            joined = _create(latent, rope, with_planes=with_planes)
            self._alive[id(joined)] = joined
        found = joined.history.look(latent, rope, trust_unversioned=trust_unversioned)
        if found is not Look.SAME:
            joined.current = False
            with torch_private.normal_tensors():
                torch.cat((latent, rope), -1, out=joined.rows)
        if joined.planes is not None and not joined.current:
            worthwhile = found is not Look.CHANGED_AGAIN
            self._renew_planes(joined, joined.planes, latent, worthwhile=worthwhile)
            joined.note = "" if worthwhile else joined.history.note
        return joined

    def after_call(self, joined: Joined, latent: torch.Tensor, rope: torch.Tensor) -> None:
        """Remember the cache as the call left it, the joined rows having been kept up with it."""
        joined.history.remember(latent, rope)
        self._joined.set(latent, rope, joined)

    def beside(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The joined rows and their planes."""
        joined = self._joined.get(key, value)
        return () if joined is None else present(joined.rows, joined.planes)

    def _renew_planes(self, joined: Joined, planes: torch.Tensor, latent: torch.Tensor, *, worthwhile: bool) -> None:
        if worthwhile:
            self._builder.rebuild(planes, joined.rows, latent, latent.shape[2])
            joined.current = True
        else:
            with torch_private.normal_tensors():
                planes[:8].view(torch.int64).fill_(PLANES_STALE)


class LatentBuffers(AppendBuffers):
    """Append buffers whose pasts are latents ``[B, 1, L, R]`` and rope keys ``[B, 1, L, Dr]``: K is both side by side, V the
    latents once more, in a tensor of their own."""

    kind: ClassVar[str] = "latent_dynamic"

    def with_capacity(
        self, past_key: torch.Tensor, past_value: torch.Tensor, capacity: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return with_room(torch.cat((past_key, past_value), -1), capacity), with_room(past_key, capacity)

    def rows(self, buffer: AppendBuffer, start: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        both, latent = buffer.key.narrow(2, start, count), buffer.value.narrow(2, start, count)
        return latent, both[..., latent.shape[3] :]


def _shape(latent: torch.Tensor, rope: torch.Tensor) -> tuple[int, ...]:
    return (*latent.shape[:3], latent.shape[3] + rope.shape[3])


def _fits(joined: Joined, latent: torch.Tensor, rope: torch.Tensor, *, with_planes: bool) -> bool:
    rows = joined.rows
    same_tensor = (*rows.shape,) == _shape(latent, rope) and rows.dtype == latent.dtype and rows.device == latent.device
    return same_tensor and (joined.planes is not None) == with_planes


def _create(latent: torch.Tensor, rope: torch.Tensor, *, with_planes: bool) -> Joined:
    with torch_private.normal_tensors():
        rows = latent.new_empty(_shape(latent, rope))
        planes = zeroed_arena(arena_layout(rows, latent).total, latent.device) if with_planes else None
    return Joined(rows, planes, latent.data_ptr())
