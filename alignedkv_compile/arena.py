"""Typed views of a plane arena's sections, and the packing of codes into nibbles, in eager torch.

The kernels address the arena by the byte offsets of :mod:`alignedkv_compile.layout`; the reference, the tests and the state
reach the same bytes through these views.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .layout import PLANES_STALE, PLANES_VALID, SCALES_BYTES, SCORE_GROUP, ArenaLayout
from .row_header import KEY_SCALE, NORM_LIMIT, VALUE_NORM, VALUE_SCALE, Field
from .storage import WINDOW, Storage


@dataclass(frozen=True)
class ArenaViews:
    """Views that alias one arena, ``BH`` = batch x KV heads, ``rows`` padded, ``D'`` padded head dimensions.

    Attributes:
        header: int64 ``[8]``.
        scales: int32 ``[BH, rows]``, a row's scales and the norm of V (see :func:`unpack_scales`).
        value_count: int32 ``[BH, blocks]``.
        value_sum: float32 ``[BH, blocks, Dv]``.
        key_hi: uint8 ``[BH, rows / 16, Dk' / 8, 16, 4]`` in score order.
        key_mid: uint8 ``[BH, rows, Dk' / 2]`` in row order.
        value_hi, value_mid: uint8 ``[BH, rows, Dv' / 2]`` in row order.
        residual: uint8 ``[BH, rows, residual_row]``, empty rows where the storage has none.
        storage: what is held of a row; the second planes of a windowed one have ``2 * WINDOW`` rows.
    """

    header: torch.Tensor
    scales: torch.Tensor
    value_count: torch.Tensor
    value_sum: torch.Tensor
    key_hi: torch.Tensor
    key_mid: torch.Tensor
    value_hi: torch.Tensor
    value_mid: torch.Tensor
    residual: torch.Tensor
    storage: Storage

    @property
    def by_row(self) -> tuple[torch.Tensor, ...]:
        """The sections whose second dimension is the cache's rows, in units of one row or one score group."""
        mids = () if self.storage.windowed else (self.key_mid, self.value_mid)
        return (self.scales, self.key_hi, self.value_hi, *mids, *((self.residual,) if self.storage.residual else ()))

    def mid_slots(self, positions: torch.Tensor) -> torch.Tensor:
        """Rows of ``key_mid`` and ``value_mid`` that belong to cache rows ``positions`` (int64)."""
        if not self.storage.windowed:
            return positions
        return torch.where(positions < WINDOW, positions, WINDOW + positions % WINDOW)

    def has_mid(self, positions: torch.Tensor) -> torch.Tensor:
        """Whether the second planes hold cache rows ``positions`` (int64): bool, likewise."""
        if not self.storage.windowed:
            return torch.ones_like(positions, dtype=torch.bool)
        return (positions < WINDOW) | (positions >= self.header[1])

    @property
    def key_hi_rows(self) -> torch.Tensor:
        """``key_hi`` where it is in row order, as on GPUs: uint8 ``[BH, rows, Dk' / 2]``."""
        return self.key_hi.view(*self.scales.shape, -1)


def arena_views(planes: torch.Tensor, layout: ArenaLayout) -> ArenaViews:
    """Views of ``planes`` (uint8 ``[>= layout.total]``).

    Raises:
        ValueError: the arena is smaller than its layout.
    """
    if planes.numel() < layout.total:
        raise ValueError(f"the plane arena holds {planes.numel()} bytes, its layout needs {layout.total}")
    heads, rows, blocks = layout.heads, layout.rows, layout.blocks

    def section(offset: int, size: int) -> torch.Tensor:
        return planes.narrow(0, offset, size)

    records = section(layout.value_sum, heads * blocks * layout.block_record).view(heads, blocks, layout.block_record)
    floats = records.view(torch.float32)
    key_bytes, value_bytes = layout.key_plane_row, layout.value_plane_row
    return ArenaViews(
        header=section(0, 64).view(torch.int64),
        scales=section(layout.scales, heads * rows * SCALES_BYTES).view(torch.int32).view(heads, rows),
        value_count=records.view(torch.int32)[..., 0],
        value_sum=floats[..., 1:],
        key_hi=section(layout.key_hi, heads * rows * key_bytes).view(
            heads, rows // SCORE_GROUP, key_bytes // 4, SCORE_GROUP, 4
        ),
        key_mid=section(layout.key_mid, heads * layout.mid_rows * key_bytes).view(heads, layout.mid_rows, key_bytes),
        value_hi=section(layout.value_hi, heads * rows * value_bytes).view(heads, rows, value_bytes),
        value_mid=section(layout.value_mid, heads * layout.mid_rows * value_bytes).view(heads, layout.mid_rows, value_bytes),
        residual=section(layout.residual, heads * rows * layout.residual_row).view(heads, rows, layout.residual_row),
        storage=layout.storage,
    )


def mark(planes: torch.Tensor, *, valid: bool) -> None:
    """Say in the header whether the planes may be read; kernels read the original cache when they may not."""
    planes.narrow(0, 0, 8).view(torch.int64).fill_(PLANES_VALID if valid else PLANES_STALE)


def pack_row_order(nibbles: torch.Tensor) -> torch.Tensor:
    """uint8 ``[..., D']`` values below 16 to ``[..., D'/2]`` bytes: element ``i`` low, ``i + D'/2`` high."""
    half = nibbles.shape[-1] // 2
    return nibbles[..., :half] | nibbles[..., half:] << 4


def unpack_row_order(packed: torch.Tensor) -> torch.Tensor:
    """Inverse of :func:`pack_row_order`."""
    return torch.cat([packed & 15, packed >> 4], -1)


def pack_score_order(nibbles: torch.Tensor) -> torch.Tensor:
    """uint8 ``[..., D']`` values below 16 to ``[..., D'/8, 4]`` bytes, one token's part of a score group."""
    runs = nibbles.view(*nibbles.shape[:-1], nibbles.shape[-1] // 8, 2, 4)
    return runs[..., 0, :] | runs[..., 1, :] << 4


def unpack_score_order(packed: torch.Tensor) -> torch.Tensor:
    """``[..., groups, D'/8, 16, 4]`` bytes in score order to nibbles ``[..., rows, D']``."""
    runs = torch.stack([packed & 15, packed >> 4], -2).movedim(-3, -4)
    return runs.reshape(*packed.shape[:-4], packed.shape[-4] * SCORE_GROUP, packed.shape[-3] * 8)


def pack_scales(key: torch.Tensor, value: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
    """int32 words from float32 scales ``key`` and ``value`` and from ``norm``, the norm of V in units of its stored scale.

    A V scale of which the largest norm would leave float32 becomes Inf, which has the row read as it is.
    """
    value = torch.where(torch.isfinite(value * NORM_LIMIT), value, value + torch.inf)
    norm_code = (norm.view(torch.int32) + (1 << VALUE_NORM.dropped - 1) - VALUE_NORM.smallest_bits) >> VALUE_NORM.dropped
    word = _scale_code(key) << KEY_SCALE.shift | _scale_code(value) << VALUE_SCALE.shift
    word |= norm_code.clamp(0, VALUE_NORM.mask).to(torch.int64) << VALUE_NORM.shift
    return (word - ((word >> 31 & 1) << 32)).to(torch.int32)


def rounded_scale(scale: torch.Tensor) -> torch.Tensor:
    """The stored number that stands for a float32 ``scale``: not below it, at most 1/16 above; Inf and NaN stay."""
    return _decoded(_scale_code(scale).to(torch.int32), KEY_SCALE)


def unpack_scales(words: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """int32 words to float32 ``(key_scale, value_scale, value_norm)``."""
    key, value, norm = (_decoded(words >> field.shift & field.mask, field) for field in (KEY_SCALE, VALUE_SCALE, VALUE_NORM))
    return key, value, value * norm


def _decoded(codes: torch.Tensor, field: Field) -> torch.Tensor:
    """The float32 of int32 codes."""
    return ((codes << field.dropped) + field.smallest_bits).view(torch.float32)


def _scale_code(scale: torch.Tensor) -> torch.Tensor:
    """The code of a scale, int64: rounded up."""
    bits = scale.view(torch.int32).to(torch.int64)
    rounded = bits + torch.where(torch.isfinite(scale), (1 << KEY_SCALE.dropped) - 1, 0)
    return torch.where(torch.isnan(scale), KEY_SCALE.code(torch.nan), rounded >> KEY_SCALE.dropped)
