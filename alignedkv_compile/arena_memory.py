"""Memory for plane arenas, in huge pages where the system gives them on request.

An aligned read goes through several sections of an arena, in some of them from listed row to listed row: with pages of 4 KiB
much of its time is spent looking up addresses.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
from collections.abc import Callable

import torch

HUGE_PAGE = 2 * 2**20
"""Bytes; arenas that are smaller have no use for one."""


def zeroed_arena(total: int, device: torch.device) -> torch.Tensor:
    """uint8 ``[total]``, all zero: an arena whose planes are stale."""
    if torch.compiler.is_compiling():  # traced code has no addresses
        return torch.zeros(total, dtype=torch.uint8, device=device)
    return unwritten_arena(total, device).zero_()


def unwritten_arena(total: int, device: torch.device) -> torch.Tensor:
    """uint8 ``[total]``, whatever the memory holds. Its pages are not touched: the first write decides how large they are."""
    arena = torch.empty(total, dtype=torch.uint8, device=device)
    has_memory = type(arena) is torch.Tensor and arena.device.type == "cpu"  # a fake one has none
    if total >= HUGE_PAGE and has_memory and (advise := _advise()):
        start = -(-arena.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        advise(start, arena.data_ptr() + total - start)
    return arena


@functools.cache
def _advise() -> Callable[[int, int], None] | None:
    """Asks for huge pages for so many bytes from an address, a whole page's, on; None where no system call does."""
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is None:
        return None
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)

    def advise(start: int, length: int) -> None:
        madvise(start, length, advice)  # a wish: a kernel that cannot fulfil it leaves small pages

    return advise
