"""What both planes leave out of a row, so that a lossless cache gives every number back bit for bit: the codec, in eager torch.

Eight bits of a row's code say that a number lies in a short interval. Floating-point numbers in it, taken in order, are few
where the interval is far from zero, and many near zero: the residual of a number is its place among them. Whoever reads the
planes knows the intervals, so nothing else is stored. bfloat16 leaves room to spare, and :mod:`.residual_fields` has its
format, made to be decoded fast. In float16 and float32 a place takes as many bits as its interval needs; a row's residual is

    byte 0, 1    half widths of the intervals of K and of V: E = scale / 256 * (1 + byte / 8)
    byte 2, 3    how many bits the residuals of K take, little-endian
    from bit 32  the residuals of K, then those of V, each from its lowest bit on

in ``(Dk + Dv) * (size - 1)`` bytes, which with both planes make the bytes of the row itself. A row whose residuals do not fit,
or that the arithmetic below cannot vouch for, is *raw*: planes and residual hold its bits as they are, and its scales are Inf,
which is how kernels know rows that are to be read as they are. Gaussian rows of bf16 fill about three quarters of the residual;
the rows of fp16 models come near its end, and some are raw.

The middle of an interval is computed with integers and single roundings of float32, so that every implementation gets the same
bits: the 8-bit codes of K are transformed back as integers, and one product makes a number of the result.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import torch

from .bit_stream import packed_bits, unpacked_bits
from .layout import CODE_RANGE, HI_STEP, MID_STEP, hadamard_blocks
from .reference_head import butterflies, dither
from .residual_fields import LARGEST_SCALE, Intervals, decode_fields, encode_fields, pack_fields

PREFIX_BYTES = 4
"""Bytes of a residual in front of its bits, but for bfloat16."""
WIDTH_STEP = 0.125
"""Half widths of intervals grow in these steps, in units of half a step of the 8-bit code."""
WIDTHS = 256
"""So many half widths there are."""
CODES = 2 * CODE_RANGE // MID_STEP
"""So many codes of 8 bits there are."""
UNIT = MID_STEP / CODE_RANGE / 2
"""Half a step of the 8-bit code over the row's scale."""
SMALLEST_SCALE = 2.0**-100
"""Rows of smaller scales, but for zeros, are raw: their arithmetic would leave the normal float32."""


def block_gain(size: int) -> float:
    """What a Hadamard block of integers is multiplied by, a float32: the transform's norm times :data:`UNIT`."""
    return float(struct.unpack("<f", struct.pack("<f", size**-0.5 * UNIT))[0])


def ordered_bits(rows: torch.Tensor) -> torch.Tensor:
    """int64: floating numbers as integers of the same order; -0 comes before 0."""
    bits = rows.view(torch.int16 if rows.element_size() == 2 else torch.int32).to(torch.int64)
    return torch.where(bits < 0, -(bits & (1 << rows.element_size() * 8 - 1) - 1) - 1, bits)


def from_ordered_bits(order: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Inverse of :func:`ordered_bits`."""
    size = dtype.itemsize * 8
    bits = torch.where(order < 0, -(order + 1) - (1 << size - 1), order)
    return bits.to(torch.int16 if dtype.itemsize == 2 else torch.int32).view(dtype)


def key_centers(codes: torch.Tensor, scale: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Middles of the intervals of K rows, transformed back: float32 ``[..., S, Dk]``.

    Args:
        codes: integers ``[..., S, Dk]`` of 8 bits.
        scale: float32 ``[..., S]``.
        positions: int64 ``[S]``.
    """
    blocks, start = [], 0
    for size in hadamard_blocks(codes.shape[-1]):
        block = butterflies(codes[..., start : start + size].to(torch.int32) * 2 - (CODES - 1))
        numbers = block.to(torch.float32)
        numbers[..., 0] -= dither(positions) * float(size * (HI_STEP // (MID_STEP // 2)))
        blocks.append(numbers * (scale * block_gain(size))[..., None])
        start += size
    return torch.cat(blocks, -1)


def value_centers(codes: torch.Tensor, scale: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Middles of the intervals of V rows: float32 ``[..., S, Dv]``; arguments as for :func:`key_centers`."""
    middle = dither(positions) * float(HI_STEP // MID_STEP) + (CODES - 1) / 2
    return (codes.to(torch.float32) - middle[:, None]) * (scale * (MID_STEP / CODE_RANGE))[..., None]


@dataclass(frozen=True)
class Residual:
    """Rows as their planes and residuals hold them, ``[..., S]`` and more dimensions.

    Attributes:
        raw: bool ``[..., S]``: rows that are held as they are.
        data: uint8 ``[..., S, residual_row]``.
    """

    raw: torch.Tensor
    data: torch.Tensor


def encode_residual(
    key: torch.Tensor,
    value: torch.Tensor,
    key_codes: torch.Tensor,
    value_codes: torch.Tensor,
    key_scale: torch.Tensor,
    value_scale: torch.Tensor,
    positions: torch.Tensor,
) -> Residual:
    """The residuals of rows.

    Args:
        key, value: ``[..., S, D]``, of bf16, fp16 or fp32.
        key_codes, value_codes: integers of 8 bits, likewise.
        key_scale, value_scale: float32 ``[..., S]``.
        positions: int64 ``[S]``.
    """
    size = (key.shape[-1] + value.shape[-1]) * (key.element_size() - 1)
    codable = torch.ones(key.shape[:-1], dtype=torch.bool, device=key.device)
    centers, units, widths = [], [], []
    for rows, codes, scale, centers_of in (
        (key, key_codes, key_scale, key_centers),
        (value, value_codes, value_scale, value_centers),
    ):
        codable &= _in_range(scale, key.dtype)
        held = torch.where(codable, scale, 0.0)
        centers.append(centers_of(codes, held, positions))
        units.append(held * UNIT)
        farthest = (rows.float() - centers[-1]).abs().amax(-1)
        steps = torch.ceil(torch.where(units[-1] > 0, farthest / units[-1], 0.0) * (1 / WIDTH_STEP) - 1 / WIDTH_STEP) + 1
        codable &= steps < WIDTHS  # false for a NaN
        widths.append(torch.where(codable, steps, 0.0).clamp(0, WIDTHS - 1))
    halves = [_half_width(unit, width) for unit, width in zip(units, widths, strict=True)]
    if key.dtype == torch.bfloat16:
        fields = [
            encode_fields(rows, Intervals.around(middle, half))
            for rows, middle, half in zip((key, value), centers, halves, strict=True)
        ]
        data, fits = pack_fields(fields[0], fields[1], torch.stack(widths, -1).to(torch.int64), size)
    else:
        data, fits = _pack_places((key, value), centers, halves, widths, size)
    codable &= fits
    verbatim = torch.cat([_bytes(key)[..., :-1].flatten(-2), _bytes(value)[..., :-1].flatten(-2)], -1)
    return Residual(~codable, torch.where(codable[..., None], data, verbatim))


def raw_codes(rows: torch.Tensor) -> torch.Tensor:
    """The uppermost byte of each number, which both planes of a raw row hold: uint8, shaped like ``rows``."""
    return _bytes(rows)[..., -1]


def decode_residual(
    data: torch.Tensor,
    raw: torch.Tensor,
    key_codes: torch.Tensor,
    value_codes: torch.Tensor,
    key_scale: torch.Tensor,
    value_scale: torch.Tensor,
    positions: torch.Tensor,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V rows ``[..., S, D]`` of ``dtype``, bit for bit; arguments as :func:`encode_residual` takes and returns them."""
    key_dim = key_codes.shape[-1]
    centers = (
        key_centers(key_codes, torch.where(raw, 0.0, key_scale), positions),
        value_centers(value_codes, torch.where(raw, 0.0, value_scale), positions),
    )
    halves = [
        _half_width(torch.where(raw, 0.0, scale) * UNIT, data[..., place].float())
        for place, scale in enumerate((key_scale, value_scale))
    ]
    if dtype == torch.bfloat16:
        around = (Intervals.around(centers[0], halves[0]), Intervals.around(centers[1], halves[1]))
        rows = torch.cat(decode_fields(data, around), -1)
    else:
        intervals = [_places(middle, half, dtype) for middle, half in zip(centers, halves, strict=True)]
        lowest, bits = (torch.cat(parts, -1) for parts in zip(*intervals, strict=True))
        rows = from_ordered_bits(lowest + unpacked_bits(data, torch.where(raw[..., None], 0, bits), PREFIX_BYTES * 8), dtype)
    verbatim = torch.cat(
        [data.unflatten(-1, (-1, dtype.itemsize - 1)), torch.cat([key_codes, value_codes], -1).to(torch.uint8)[..., None]], -1
    )
    rows = torch.where(raw[..., None], verbatim.contiguous().view(dtype)[..., 0], rows)
    return rows[..., :key_dim], rows[..., key_dim:]


def _in_range(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """bool: rows of this scale are not raw for it."""
    if dtype == torch.bfloat16:
        return (scale >= SMALLEST_SCALE) & (scale <= LARGEST_SCALE)
    return torch.isfinite(scale) & ((scale >= SMALLEST_SCALE) | (scale == 0))


def _half_width(unit: torch.Tensor, width: torch.Tensor) -> torch.Tensor:
    return unit * (width * WIDTH_STEP + 1)


def _pack_places(
    rows: tuple[torch.Tensor, torch.Tensor],
    centers: list[torch.Tensor],
    halves: list[torch.Tensor],
    widths: list[torch.Tensor],
    size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Residuals uint8 ``[..., S, size]`` of float16 and float32, and bool ``[..., S]``, which rows they hold."""
    places, bits = [], []
    for numbers, middle, half in zip(rows, centers, halves, strict=True):
        lowest, needed = _places(middle, half, numbers.dtype)
        places.append(ordered_bits(numbers) - lowest)
        bits.append(needed)
    place, needed, key_bits = torch.cat(places, -1), torch.cat(bits, -1), bits[0].sum(-1)
    codable = ((place >= 0) & (place < 1 << needed)).all(-1) & (needed.sum(-1) <= (size - PREFIX_BYTES) * 8)
    prefix = torch.stack([*(width.to(torch.int64) for width in widths), key_bits % 256, key_bits // 256], -1)
    numbers, taken = torch.cat([prefix, place.clamp_min(0)], -1), torch.cat([torch.full_like(prefix, 8), needed], -1)
    return packed_bits(numbers, torch.where(codable[..., None], taken, 0), size), codable


def _places(centers: torch.Tensor, half: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The first number of each interval in :func:`ordered_bits`, and how many bits its numbers' places take: int64."""
    low, high = ((centers - half[..., None]).to(dtype).contiguous(), (centers + half[..., None]).to(dtype).contiguous())
    first = torch.where(low == 0, -1, ordered_bits(low))  # both zeros belong to an interval that ends at one
    last = torch.where(high == 0, 0, ordered_bits(high))
    count = last - first
    bits = torch.zeros_like(count)
    for bit in range(8 * dtype.itemsize + 1):
        bits += (count >> bit) > 0
    return first, bits


def _bytes(rows: torch.Tensor) -> torch.Tensor:
    """uint8 ``[..., D, size]``, the lowest byte first."""
    return rows.contiguous().view(torch.uint8).unflatten(-1, (-1, rows.element_size()))
