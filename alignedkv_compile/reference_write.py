"""The meaning of the operators that write planes, and of the one that makes rows of them again, in eager torch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import library

from . import ops
from .arena import (
    ArenaViews,
    arena_views,
    pack_row_order,
    pack_scales,
    pack_score_order,
    rounded_scale,
    unpack_row_order,
    unpack_scales,
)
from .arena_copies import resized
from .layout import (
    BLOCK_ROWS,
    CODE_RANGE,
    HEADROOM,
    HI_STEP,
    MID_STEP,
    NIBBLE_CENTER,
    PLANES_VALID,
    SCORE_GROUP,
    ArenaLayout,
    padded_head_dim,
    score_ordered,
)
from .reference_head import dequantize, dither, hadamard, key_nibbles
from .residual import decode_residual, encode_residual, raw_codes
from .storage import BESIDE, STORAGES, WINDOW


def encode(rows: torch.Tensor, scale: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The upper 8 bits of the codes of float32 ``rows [..., S, D]`` at ``positions [S]``: int32 in [0, 256)."""
    factor = torch.where(scale > 0, CODE_RANGE / scale, 0.0)
    code = torch.floor(rows * factor[..., None] + dither(positions)[:, None] * HI_STEP)
    code = torch.nan_to_num(code, nan=0.0).clamp(-CODE_RANGE, CODE_RANGE - 1).to(torch.int32) + CODE_RANGE
    return code // MID_STEP


@dataclass(frozen=True)
class EncodedRows:
    """Rows of all heads as the sections of an arena take them, ``[BH, S]`` and more dimensions.

    Attributes:
        words: int32: scales and the norm of V.
        key, value: int32 ``[BH, S, D]``: codes of 8 bits.
        residual: uint8 ``[BH, S, residual_row]``, or None.
        numbers: float32 ``[BH, S, Dv]``: V as it is, for the sums of blocks.
    """

    words: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    residual: torch.Tensor | None
    numbers: torch.Tensor


def encode_rows(key: torch.Tensor, value: torch.Tensor, positions: torch.Tensor, layout: ArenaLayout) -> EncodedRows:
    """Encode ``key [BH, S, Dk]`` and ``value [BH, S, Dv]`` for ``positions [S]``."""
    mixed, numbers = hadamard(key), value.float()
    key_scale, value_scale = (
        rounded_scale(rows.abs().amax(-1) * HEADROOM) if rows.numel() else rows.new_zeros(rows.shape[:-1])
        for rows in (mixed, numbers)
    )
    inverse = torch.where(value_scale > 0, 1 / value_scale, 0.0)
    words = pack_scales(key_scale, value_scale, (numbers * inverse[..., None]).norm(dim=-1))
    key_codes, value_codes = encode(mixed, key_scale, positions), encode(numbers, value_scale, positions)
    if not layout.storage.residual:
        return EncodedRows(words, key_codes, value_codes, None, numbers)
    held_key, held_value, _ = unpack_scales(words)
    rest = encode_residual(key, value, key_codes, value_codes, held_key, held_value, positions)
    infinite = torch.full_like(key_scale, torch.inf)
    raw = pack_scales(infinite, infinite, torch.ones_like(key_scale))
    return EncodedRows(
        torch.where(rest.raw, raw, words),
        torch.where(rest.raw[..., None], raw_codes(key).to(torch.int32), key_codes),
        torch.where(rest.raw[..., None], raw_codes(value).to(torch.int32), value_codes),
        rest.data,
        numbers,
    )


@library.impl(f"{ops.NAMESPACE}::quantize_on_write", "CompositeExplicitAutograd")
def quantize_on_write(
    planes: torch.Tensor, key: torch.Tensor, value: torch.Tensor, positions: torch.Tensor, capacity: int
) -> None:
    """See :data:`alignedkv_compile.ops.quantize_on_write`."""
    _write(planes, key, value, positions, capacity, BESIDE.name)


@library.impl(f"{ops.NAMESPACE}::store_rows", "CompositeExplicitAutograd")
def store_rows(
    planes: torch.Tensor, key: torch.Tensor, value: torch.Tensor, positions: torch.Tensor, capacity: int, storage: str
) -> None:
    """See :data:`alignedkv_compile.ops.store_rows`."""
    if bool(((positions < 0) | (positions >= capacity)).any()):
        raise IndexError(f"a row is written outside of a cache of {capacity} rows")
    _write(planes, key, value, positions, capacity, storage)
    header = planes.narrow(0, 0, 16).view(torch.int64)
    header[0] = PLANES_VALID


def _write(
    planes: torch.Tensor, key: torch.Tensor, value: torch.Tensor, positions: torch.Tensor, capacity: int, storage: str
) -> None:
    batch, heads, _, key_dim = key.shape
    layout = ArenaLayout(batch * heads, capacity, key_dim, value.shape[-1], STORAGES[storage], key.element_size())
    views = arena_views(planes, layout)
    inside = (positions >= 0) & (positions < capacity)
    positions = positions[inside]
    if not len(positions):
        return
    rows = encode_rows(key[:, :, inside].flatten(0, 1), value[:, :, inside].flatten(0, 1), positions, layout)
    views.scales[:, positions] = rows.words
    key_hi = _padded(rows.key // (HI_STEP // MID_STEP))
    if score_ordered(planes.device):
        views.key_hi[:, positions // SCORE_GROUP, :, positions % SCORE_GROUP] = pack_score_order(key_hi).movedim(0, 1)
    else:
        views.key_hi_rows[:, positions] = pack_row_order(key_hi)
    views.value_hi[:, positions] = pack_row_order(_padded(rows.value // (HI_STEP // MID_STEP)))
    if layout.storage.windowed:
        views.header[1] = torch.maximum(views.header[1], positions.max() + 1 - WINDOW)
    held = views.has_mid(positions)
    slots = views.mid_slots(positions[held])
    views.key_mid[:, slots] = pack_row_order(_padded(rows.key[:, held] % (HI_STEP // MID_STEP)))
    views.value_mid[:, slots] = pack_row_order(_padded(rows.value[:, held] % (HI_STEP // MID_STEP)))
    if rows.residual is not None:
        views.residual[:, positions] = rows.residual
    _sum_blocks(views, rows.numbers, positions)


def _padded(nibbles: torch.Tensor) -> torch.Tensor:
    """Nibbles ``[..., D]`` as uint8, padded to whole stored rows with zeros."""
    return torch.nn.functional.pad(nibbles, (0, padded_head_dim(nibbles.shape[-1]) - nibbles.shape[-1])).to(torch.uint8)


def _sum_blocks(views: ArenaViews, values: torch.Tensor, positions: torch.Tensor) -> None:
    """Add rows to their block's sum in order; a row that does not continue the block makes the sum unusable."""
    numbers = positions.tolist()
    index = 0
    while index < len(numbers):
        rows = 1  # that follow one another
        while index + rows < len(numbers) and numbers[index + rows] == numbers[index] + rows:
            rows += 1
        _sum_run(views, values[:, index : index + rows], numbers[index])
        index += rows


def _sum_run(views: ArenaViews, values: torch.Tensor, start: int) -> None:
    """Rows from ``start`` on, ``[BH, S, Dv]``. All blocks at once, each row by row, so that sums do not depend on which rows
    come together."""
    rows = values.shape[1]
    first, place = divmod(start, BLOCK_ROWS)
    blocks = (place + rows - 1) // BLOCK_ROWS + 1
    end = place + rows - (blocks - 1) * BLOCK_ROWS  # rows of the last block
    touched = slice(first, first + blocks)
    padding = (0, 0, place, blocks * BLOCK_ROWS - place - rows)
    grid = torch.nn.functional.pad(values, padding).unflatten(1, (blocks, BLOCK_ROWS))
    total = views.value_sum[:, touched].clone()
    for row in range(place, end) if blocks == 1 else range(BLOCK_ROWS):
        present = slice(int(row < place), blocks if row < end else blocks - 1)
        total[:, present] = grid[:, present, row] if row == 0 else total[:, present] + grid[:, present, row]
    usable = torch.isfinite(total).all(-1)
    if place > 0:
        usable[:, 0] &= views.value_count[:, first] == place
    count = torch.full_like(views.value_count[:, touched], BLOCK_ROWS)
    count[:, -1] = end
    views.value_sum[:, touched] = total
    views.value_count[:, touched] = torch.where(usable, count, -1)


@library.impl(f"{ops.NAMESPACE}::resized_planes", "CompositeExplicitAutograd")
def resized_planes(
    planes: torch.Tensor,
    heads: int,
    capacity: int,
    key_dim: int,
    value_dim: int,
    storage: str,
    element_size: int,
    rows: int,
) -> torch.Tensor:
    """See :data:`alignedkv_compile.ops.resized_planes`."""
    return resized(planes, ArenaLayout(heads, capacity, key_dim, value_dim, STORAGES[storage], element_size), rows)


@library.impl(f"{ops.NAMESPACE}::load_rows", "CompositeExplicitAutograd")
def load_rows(
    planes: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    positions: torch.Tensor,
    rows: int,
    capacity: int,
    storage: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :data:`alignedkv_compile.ops.load_rows`."""
    batch, heads, _, key_dim = key.shape
    layout = ArenaLayout(batch * heads, capacity, key_dim, value.shape[-1], STORAGES[storage], key.element_size())
    views = arena_views(planes, layout)
    keys, values = (held.unflatten(0, (batch, heads)) for held in held_rows(views, layout, slice(None), rows, key.dtype))
    inside = positions < rows
    return (
        keys.index_copy(2, positions[inside], key[:, :, inside]),
        values.index_copy(2, positions[inside], value[:, :, inside]),
    )


def held_rows(
    views: ArenaViews, layout: ArenaLayout, heads: slice, length: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of the first ``length`` rows of some heads, as well as the storage holds them: ``[heads, length, D]``.

    A row that was never written is zero. Without a residual, a row that holds Inf or NaN comes back as NaN.
    """
    positions = torch.arange(length, device=views.scales.device)
    key_scale, value_scale, _ = unpack_scales(views.scales[heads, :length])
    key_hi = key_nibbles(views, heads)[:, :length, : layout.key_dim]
    value_hi = unpack_row_order(views.value_hi[heads, :length])[..., : layout.value_dim]
    stored = views.has_mid(positions)
    slots = torch.where(stored, views.mid_slots(positions), 0)
    key_mid, value_mid = (
        unpack_row_order(plane[heads][:, slots])[..., :dim]
        for plane, dim in ((views.key_mid, layout.key_dim), (views.value_mid, layout.value_dim))
    )
    if layout.storage.residual:
        key_codes, value_codes = (hi.to(torch.int32) * 16 + mid for hi, mid in ((key_hi, key_mid), (value_hi, value_mid)))
        data, raw = views.residual[heads, :length], ~torch.isfinite(key_scale)
        return decode_residual(data, raw, key_codes, value_codes, key_scale, value_scale, positions, dtype)
    key, value = (
        _dequantized(hi, mid, scale, positions, stored)
        for hi, mid, scale in ((key_hi, key_mid, key_scale), (value_hi, value_mid, value_scale))
    )
    return hadamard(key).to(dtype), value.to(dtype)


def cache_rows(
    planes: torch.Tensor,
    batch: int,
    heads: int,
    key_dim: int,
    value_dim: int,
    dtype: torch.dtype,
    storage: str,
    capacity: int,
    length: int,
) -> tuple[ArenaViews, ArenaLayout, torch.Tensor, torch.Tensor]:
    """An arena that is the cache, and K and V of its first ``length`` rows as cache tensors: ``[B, H, length, D]``."""
    layout = ArenaLayout(batch * heads, capacity, key_dim, value_dim, STORAGES[storage], dtype.itemsize)
    views = arena_views(planes, layout)
    key, value = (rows.unflatten(0, (batch, heads)) for rows in held_rows(views, layout, slice(None), length, dtype))
    return views, layout, key, value


def _dequantized(
    hi: torch.Tensor, mid: torch.Tensor, scale: torch.Tensor, positions: torch.Tensor, has_mid: torch.Tensor
) -> torch.Tensor:
    """Middles of the intervals that planes say numbers lie in: of both planes where ``has_mid [S]``, else of the first."""
    rows = dequantize(hi, scale, dither(positions))
    finer = (mid.float() - NIBBLE_CENTER) * (scale[..., None] * (MID_STEP / CODE_RANGE))
    rows = rows + torch.where(has_mid[:, None], finer, 0.0)
    return torch.where(torch.isfinite(scale)[..., None], rows, torch.nan)
