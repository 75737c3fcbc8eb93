"""Residuals of bfloat16 rows: fields of one width for a row's numbers, and a byte more for those near zero. Eager torch.

A number's code says that it lies within ``half`` of a middle ``c``. Where ``a = |c| - half`` is large, it has the sign of ``c``
and few bfloat16 numbers are that near: its *field* is the place of its magnitude among them, counted from that of ``a``.
Numbers with ``a`` below the row's *threshold*, a power of two, *escape*: a byte is added to their field, and both hold the sign
and the place among the magnitudes that end at the largest one which escapes, or 0 for a zero.

Fields of one width and escapes that a comparison finds are what vectors decode without a look at the number before. Places in
as many bits as each needs (:mod:`.residual`) take a third less, but bfloat16 leaves eight bits for them, and these take six.

K and V of a row each have a width of 1 to 8 bits and a threshold; those are taken that need the fewest bytes. The row is

    byte 0, 1   half widths of the intervals of K and of V, as in :mod:`.residual`
    byte 2      the width of the fields of K in its low, that of V in its high nibble
    byte 3      thresholds likewise: the exponent of ``half`` plus so much is that of the threshold
    byte 4      how many numbers of K escape
    from 5      fields of K in whole bytes, then a byte for each number of K that escapes, in order; then the same of V
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .bit_stream import packed_bits, unpacked_bits

PREFIX_BYTES = 5
"""Bytes in front of the fields of K."""
WIDEST = 8
"""Bits of the widest field."""
MOST = 15
"""The highest threshold, and what a nibble holds."""
MOST_ESCAPES = 255
"""Of the numbers of K or of V, what a byte holds."""
SIGN = 7
"""The bit of an escape's byte that holds the sign."""
LARGEST_SCALE = 2.0**100
"""Rows of larger scales are raw: their thresholds would leave float32."""

_MAGNITUDE = 0x7FFF


@dataclass(frozen=True)
class Intervals:
    """Where numbers lie, by their codes.

    Attributes:
        low: float32 ``[..., S, D]``: the lowest magnitude.
        negative: bool ``[..., S, D]``: the sign that a number far from zero has.
        half: float32 ``[..., S]``.
    """

    low: torch.Tensor
    negative: torch.Tensor
    half: torch.Tensor

    @staticmethod
    def around(centers: torch.Tensor, half: torch.Tensor) -> Intervals:
        return Intervals(centers.abs() - half[..., None], centers.view(torch.int32) < 0, half)

    @property
    def first(self) -> torch.Tensor:
        """int64: the magnitude that fields count from; anything where numbers escape."""
        return self.low.view(torch.int32).to(torch.int64) >> 16

    @property
    def height(self) -> torch.Tensor:
        """int64: the least threshold at which a number escapes, from 0 on."""
        exponents = self.low.view(torch.int32) >> 23
        above = exponents - (self.half.view(torch.int32) >> 23)[..., None] + 1
        return torch.where(self.low > 0, above, 0).clamp_min(0).to(torch.int64)

    def largest_escaping(self, threshold: torch.Tensor) -> torch.Tensor:
        """int64 ``[..., S]``: the largest magnitude of a number that escapes at ``threshold [..., S]``."""
        exponent = (self.half.view(torch.int32).to(torch.int64) >> 23) + threshold
        below = (exponent << 23).to(torch.int32).view(torch.float32)
        return (below + 2 * self.half).view(torch.int32).to(torch.int64) >> 16


@dataclass(frozen=True)
class Fields:
    """Numbers ``[..., S, D]`` as fields and escapes; what is said of a row ``[..., S]``.

    Attributes:
        width, threshold: int64 ``[..., S]``.
        place: int64 ``[..., S, D]``: fields.
        escaped: bool ``[..., S, D]``.
        extra: int64 ``[..., S, D]``: the bytes of those that escape.
        codable: bool ``[..., S]``.
    """

    width: torch.Tensor
    threshold: torch.Tensor
    place: torch.Tensor
    escaped: torch.Tensor
    extra: torch.Tensor
    codable: torch.Tensor

    @property
    def size(self) -> torch.Tensor:
        """int64 ``[..., S]``: bytes."""
        return _field_bytes(self.width, self.place.shape[-1]) + self.escaped.sum(-1)

    def stream(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Numbers and bits of each, for :func:`packed_bits`: fields, what fills their last byte, escapes."""
        width = self.width[..., None].expand_as(self.place)
        fill = _field_bytes(self.width, self.place.shape[-1]) * 8 - width.sum(-1)
        numbers = torch.cat([self.place, torch.zeros_like(fill)[..., None], self.extra], -1)
        return numbers, torch.cat([width, fill[..., None], 8 * self.escaped.to(torch.int64)], -1)


def encode_fields(rows: torch.Tensor, intervals: Intervals) -> Fields:
    """bfloat16 ``rows [..., S, D]`` in the fewest bytes; of several widths that take as many, the narrowest."""
    bits = rows.view(torch.int16).to(torch.int64)
    magnitude, negative = bits & _MAGNITUDE, bits < 0
    from_first, height = magnitude - intervals.first, intervals.height
    best: Fields | None = None
    for width in range(1, WIDEST + 1):
        fits = (negative == intervals.negative) & (from_first >= 0) & (from_first < 1 << width)
        threshold = torch.where(fits, 0, height).amax(-1)
        codable = threshold <= MOST
        threshold = threshold.clamp_max(MOST)
        escaped = height <= threshold[..., None]
        base = (intervals.largest_escaping(threshold) + 1 - (1 << width + SIGN))[..., None]
        place = torch.where(magnitude == 0, 0, magnitude - base)
        held = (magnitude == 0) | (place > 0) & (place < 1 << width + SIGN)
        codable &= (held | ~escaped).all(-1) & (escaped.sum(-1) <= MOST_ESCAPES)
        code = torch.where(held, place, 0) | negative.to(torch.int64) << width + SIGN
        found = Fields(
            torch.full_like(threshold, width),
            threshold,
            torch.where(escaped, code & (1 << width) - 1, torch.where(fits, from_first, 0)),
            escaped,
            code >> width,
            codable,
        )
        best = found if best is None else _shorter(best, found)
    assert best is not None
    return best


def _shorter(one: Fields, other: Fields) -> Fields:
    better = other.codable & (~one.codable | (other.size < one.size))
    parts = (
        torch.where(better if mine.dim() == better.dim() else better[..., None], theirs, mine)
        for mine, theirs in zip(vars(one).values(), vars(other).values(), strict=True)
    )
    return Fields(*parts)


def pack_fields(key: Fields, value: Fields, widths: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of residuals: uint8 ``[..., S, size]``, and bool ``[..., S]``, which of them hold their numbers.

    Args:
        key, value: fields.
        widths: int64 ``[..., S, 2]``: codes of the half widths.
        size: bytes of a row.
    """
    codable = key.codable & value.codable & (PREFIX_BYTES + key.size + value.size <= size)
    nibbles = [key.width | value.width << 4, key.threshold | value.threshold << 4]
    prefix = torch.cat([widths, torch.stack([*nibbles, key.escaped.sum(-1)], -1)], -1)
    (key_numbers, key_bits), (value_numbers, value_bits) = key.stream(), value.stream()
    numbers = torch.cat([prefix, key_numbers, value_numbers], -1)
    bits = torch.cat([torch.full_like(prefix, 8), key_bits, value_bits], -1)
    return packed_bits(numbers, torch.where(codable[..., None], bits, 0), size), codable


def decode_fields(data: torch.Tensor, intervals: tuple[Intervals, Intervals]) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V ``[..., S, D]`` in bfloat16, out of residuals ``[..., S, size]``; what raw rows give is unspecified."""
    prefix = data[..., :PREFIX_BYTES].to(torch.int64)
    rows = []
    start = torch.full_like(prefix[..., 0], PREFIX_BYTES)
    for which, at in enumerate(intervals):
        dim = at.low.shape[-1]
        width, threshold = ((prefix[..., place] >> 4 * which & 15) for place in (2, 3))
        field = unpacked_bits(data, width[..., None].expand(*width.shape, dim), start * 8)
        escaped = at.height <= threshold[..., None]
        start = start + _field_bytes(width, dim)
        extra = unpacked_bits(data, 8 * escaped.to(torch.int64), start * 8)
        start = start + escaped.sum(-1)
        place = (field | extra << width[..., None]) & (1 << width + SIGN)[..., None] - 1
        base = (at.largest_escaping(threshold) + 1 - (1 << width + SIGN))[..., None]
        magnitude = torch.where(escaped, torch.where(place == 0, 0, base + place), at.first + field)
        negative = torch.where(escaped, extra >> SIGN == 1, at.negative)
        bits = magnitude & _MAGNITUDE | torch.where(negative, ~_MAGNITUDE, 0)
        rows.append(bits.to(torch.int16).view(torch.bfloat16))
    return rows[0], rows[1]


def _field_bytes(width: torch.Tensor, dim: int) -> torch.Tensor:
    return (width * dim + 7) // 8
