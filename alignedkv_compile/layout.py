"""Where every byte of a plane arena lies: sections, widths, strides, in one place from which all others take them.

What a row's header holds is :mod:`.row_header`; eager views of the sections are :mod:`.arena`.

A *plane arena* holds the narrow planes of K and V of one layer in a single 1-D ``uint8`` tensor, so that a compiled graph takes
one input per layer for them: beside the cache tensors, or in their place (:mod:`.storage`). Its sections follow each other,
each 64-byte aligned and contiguous over ``[batch, kv head, row]``; rows are padded to whole blocks of :data:`BLOCK_ROWS`
tokens:

=============  =====================  ==================================================================================
section        bytes per row          content
=============  =====================  ==================================================================================
header         (64 in all)            int64[0] is :data:`PLANES_VALID` or :data:`PLANES_STALE`, int64[1] the first row of the
                                      window (below); the rest is reserved
scales         4                      the row's header, one uint32 with both scales and the norm of V (:mod:`.row_header`)
value_sum      (4 + 4 Dv) per block   int32 number of rows summed so far (-1: not usable), then the float32 sum of those V rows
key_hi         Dk'/2                  4-bit plane of K: on a CPU in *score order*, on a GPU in *row order* (below)
key_mid        Dk'/2                  4-bit plane of K in *row order*
value_hi       Dv'/2                  4-bit plane of V in row order
value_mid      Dv'/2                  4-bit plane of V in row order
residual       (Dk + Dv) (size - 1)   in a lossless cache: what the planes leave out of numbers of ``size`` bytes
                                      (:mod:`.residual`)
turns          (8 in all, per head)   two int32. GPU: how many programs of its kernels have finished the head, zero between
                                      calls. CPU: for how many calls more the head is read at all bits, and how many calls
                                      that was decided for the last time
=============  =====================  ==================================================================================

``D'`` is the head dimension padded to a multiple of 16 with zero codes. *Row order*: byte ``i`` of a row holds element ``i``
in its low and element ``i + D'/2`` in its high nibble, so that eight or sixteen bytes unpack into two runs of consecutive
elements. *Score order*: groups of 16 tokens; inside a group, for each run ``g`` of eight elements, 64 bytes: token ``t``'s
bytes ``4t..4t+3`` hold elements ``8g..8g+3`` in the low and ``8g+4..8g+7`` in the high nibbles. A 64-byte load then feeds
int8 dot products that leave one sum per token, with no horizontal addition.

In a ``4bit+`` cache ``key_mid`` and ``value_mid`` have :data:`.storage.WINDOW` rows for the first rows of the cache and a ring
of as many for the last ones: a row from the header's int64[1] on is in it, at :func:`.storage.mid_slot`.

The 16-bit code that the planes are cut from is ``X = clamp(floor(Hx * 32768 / scale + 4096 * dither), int16)``; a plane stores
a nibble of ``X + 32768``, so nibbles are unsigned everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch

from .storage import BESIDE, WINDOW, Storage

IntLike = TypeVar("IntLike", int, torch.SymInt)

BLOCK_ROWS = 128
"""Tokens per block: the unit of the V sums and of row padding."""
SCORE_GROUP = 16
"""Tokens per group of the score order."""
ALIGNMENT = 64
"""Bytes; every section starts on a multiple of it."""
ELEMENT_PADDING = 16
"""Head dimensions are padded to a multiple of this."""
MAX_HEAD_DIM = 576
"""What K of multi-latent attention has in absorbed form: a latent of 512 and a rotary part of 64."""

PLANES_STALE = 0
"""Header word: the planes say nothing about the cache; read the 16-bit (or 32-bit) original."""
PLANES_VALID = 1

DITHER_MULTIPLIER = 2654435769
"""Golden ratio in units of 2**-32. Row ``j`` is shifted by ``((j * DITHER_MULTIPLIER) mod 2**32) / 2**32 - 1/2`` steps of the
4-bit plane: a low-discrepancy sequence, so that repeated tokens do not repeat their rounding errors."""
DITHER_UNIT = 2.0**-32
"""The same in steps of the 4-bit plane."""
HI_STEP = 4096
"""One step of the 4-bit plane, in units of the 16-bit code."""
MID_STEP = 256
"""One step of both planes together, in units of the 16-bit code."""
PLANE_RATIO = HI_STEP // MID_STEP
"""A step of the 4-bit plane over one of both."""
CODE_RANGE = 32768
"""The 16-bit code of a number equal to its row's scale."""
NIBBLE_CENTER = 7.5
"""What is taken off a nibble of either plane: nibbles are unsigned, and a code stands for the middle of its interval."""
HEADROOM = 16.0 / 15.0
"""Scale head-room that keeps the dithered code inside int16."""

TURNS_BYTES = 8
"""Bytes per (batch, head) of ``turns``."""
LONGEST_WAIT = 31
"""Calls at most for which a head is read at all bits on a CPU, before fewer are tried again."""
SCALES_BYTES = 4
"""Bytes per row of ``scales``."""


def _align(size: IntLike) -> IntLike:
    return (size + (ALIGNMENT - 1)) // ALIGNMENT * ALIGNMENT


def padded_head_dim(head_dim: int) -> int:
    """Elements per stored row: ``head_dim`` rounded up to a multiple of :data:`ELEMENT_PADDING`."""
    return -(-head_dim // ELEMENT_PADDING) * ELEMENT_PADDING


def padded_rows(capacity: IntLike, unit: int = BLOCK_ROWS) -> IntLike:
    """Rows per (batch, head) in every section: ``capacity`` rounded up to whole units."""
    return (capacity + (unit - 1)) // unit * unit


def score_ordered(device: torch.device) -> bool:
    """Whether eager code keeps ``key_hi`` in score order on this device: CPUs do, GPUs want row order in every plane. Generated
    C++ always uses score order, generated Triton always row order; only tests, which interpret Triton on CPU tensors, see
    both on one."""
    return device.type == "cpu"


def hadamard_blocks(head_dim: int) -> tuple[int, ...]:
    """Sizes of the orthonormal Hadamard blocks that mix a K row: the binary digits of ``head_dim``, largest first."""
    return tuple(1 << bit for bit in reversed(range(head_dim.bit_length())) if head_dim >> bit & 1)


@dataclass(frozen=True)
class ArenaLayout:
    """Byte offsets of the sections for one pair of caches.

    Args:
        heads: batch size times number of KV heads.
        capacity: rows that the cache tensors hold, live or not (an int or a SymInt).
        key_dim: head dimension of K.
        value_dim: head dimension of V.
        storage: what the arena holds of a row.
        element_size: bytes of a number of the cache; matters to a residual only.
    """

    heads: int
    capacity: int
    key_dim: int
    value_dim: int
    storage: Storage = BESIDE
    element_size: int = 2

    @property
    def rows(self) -> int:
        """Padded rows per (batch, head): to whole blocks, or to whole groups where every byte counts."""
        return padded_rows(self.capacity, SCORE_GROUP if self.storage.packed else BLOCK_ROWS)

    @property
    def blocks(self) -> int:
        """Blocks of :data:`BLOCK_ROWS` rows per (batch, head)."""
        return (self.capacity + (BLOCK_ROWS - 1)) // BLOCK_ROWS

    @property
    def mid_rows(self) -> int:
        """Rows per (batch, head) of the second planes."""
        return 2 * WINDOW if self.storage.windowed else self.rows

    @property
    def residual_row(self) -> int:
        """Bytes of one row's residual: with both planes, the bytes of the row itself."""
        return (self.key_dim + self.value_dim) * (self.element_size - 1) if self.storage.residual else 0

    @property
    def stored_row(self) -> int:
        """Bytes that reading a row at all bits takes, where the arena is the cache (its first and last rows, if it is windowed,
        take the second planes' on top)."""
        planes = (self.key_plane_row + self.value_plane_row) * (1 if self.storage.windowed else 2)
        return SCALES_BYTES + planes + self.residual_row

    @property
    def key_plane_row(self) -> int:
        """Bytes of one row of one K plane."""
        return padded_head_dim(self.key_dim) // 2

    @property
    def value_plane_row(self) -> int:
        """Bytes of one row of one V plane."""
        return padded_head_dim(self.value_dim) // 2

    @property
    def block_record(self) -> int:
        """Bytes of one record of ``value_sum``: int32 count, then ``value_dim`` float32 sums."""
        return 4 + 4 * self.value_dim

    @property
    def scales(self) -> int:
        return ALIGNMENT

    @property
    def value_sum(self) -> int:
        return self.scales + _align(self.heads * self.rows * SCALES_BYTES)

    @property
    def key_hi(self) -> int:
        return self.value_sum + _align(self.heads * self.blocks * self.block_record)

    @property
    def key_mid(self) -> int:
        return self.key_hi + _align(self.heads * self.rows * self.key_plane_row)

    @property
    def value_hi(self) -> int:
        return self.key_mid + _align(self.heads * self.mid_rows * self.key_plane_row)

    @property
    def value_mid(self) -> int:
        return self.value_hi + _align(self.heads * self.rows * self.value_plane_row)

    @property
    def residual(self) -> int:
        return self.value_mid + _align(self.heads * self.mid_rows * self.value_plane_row)

    @property
    def turns(self) -> int:
        return self.residual + _align(self.heads * self.rows * self.residual_row)

    @property
    def total(self) -> int:
        """Bytes of the whole arena; the last section is followed by room for one vector load past its end."""
        return self.turns + _align(self.heads * TURNS_BYTES) + ALIGNMENT


def arena_layout(key: torch.Tensor, value: torch.Tensor) -> ArenaLayout:
    """Layout for caches ``key [B, H, C, Dk]`` and ``value [B, H, C, Dv]``; sizes may be symbolic."""
    batch, heads, capacity, key_dim = key.shape
    return ArenaLayout(batch * heads, capacity, key_dim, value.shape[-1])
