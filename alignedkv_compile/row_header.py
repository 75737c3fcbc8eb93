"""The header of a row of the plane arena, described once: one 32-bit word that holds the scales of K and V and the norm of V.

========  ======  ==================  ========================================================================================
field     bits    of a float32        content
========  ======  ==================  ========================================================================================
K scale   20-31   8 exponent, 4 man.  ``absmax(H k) * 16/15``, rounded up: at most 1/16 above
V scale   8-19    8 exponent, 4 man.  ``absmax(v) * 16/15``, likewise
V norm    0-7     3 exponent, 5 man.  ``||v||`` over the row's stored V scale, from 1/2 on, rounded to nearest: within 1/64
========  ======  ==================  ========================================================================================

A field's code is what is left of a float32 when :attr:`Field.dropped` low bits are left out and the code of
:attr:`Field.smallest` is taken off, so that decoding is shifts, a mask and a sum. Inf and NaN stay what they are in a scale.
The numbers are never negative: the sign takes no bit.

:mod:`.arena` packs and unpacks with these fields; the kernels of both targets get :data:`CONSTANTS`.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass

FLOAT32_MANTISSA = 23


def float32_bits(number: float) -> int:
    """The bits of a float32."""
    return int.from_bytes(struct.pack("<f", number), "little")


@dataclass(frozen=True)
class Field:
    """A part of the word.

    Attributes:
        shift: place of its lowest bit in the word.
        exponent_bits, mantissa_bits: of a float32, that its code keeps.
        smallest: the number whose code is zero.
    """

    shift: int
    exponent_bits: int
    mantissa_bits: int
    smallest: float = 0.0

    @property
    def width(self) -> int:
        """Bits of a code."""
        return self.exponent_bits + self.mantissa_bits

    @property
    def mask(self) -> int:
        """The largest code."""
        return (1 << self.width) - 1

    @property
    def dropped(self) -> int:
        """Low bits of a float32 that a code leaves out."""
        return FLOAT32_MANTISSA - self.mantissa_bits

    @property
    def smallest_bits(self) -> int:
        """What is taken off the bits of a float32."""
        return float32_bits(self.smallest)

    def code(self, number: float) -> int:
        """The code of a number that needs no rounding."""
        return (float32_bits(number) - self.smallest_bits) >> self.dropped


VALUE_NORM = Field(0, exponent_bits=3, mantissa_bits=5, smallest=0.5)
"""A row's norm is at least 15/17 of its scale, and at most ``sqrt(MAX_HEAD_DIM)`` times it; the codes end at 126 times."""
VALUE_SCALE = Field(VALUE_NORM.width, exponent_bits=8, mantissa_bits=4)
KEY_SCALE = Field(VALUE_SCALE.shift + VALUE_SCALE.width, exponent_bits=8, mantissa_bits=4)

NORM_LIMIT = VALUE_NORM.smallest * 2.0 ** (1 << VALUE_NORM.exponent_bits)
"""No norm reaches this many scales. A V scale of which this many leave float32 is stored as Inf."""

CONSTANTS: Mapping[str, int | float] = {
    "KEY_SCALE_SHIFT": KEY_SCALE.shift,
    "VALUE_SCALE_SHIFT": VALUE_SCALE.shift,
    "SCALE_DROPPED": KEY_SCALE.dropped,
    "SCALE_MASK": KEY_SCALE.mask << KEY_SCALE.dropped,
    "SCALE_INF": KEY_SCALE.code(float("inf")),
    "SCALE_NAN": KEY_SCALE.code(float("nan")),
    "NORM_DROPPED": VALUE_NORM.dropped,
    "NORM_MASK": VALUE_NORM.mask,
    "SMALLEST_NORM_BITS": VALUE_NORM.smallest_bits,
    "NORM_LIMIT": NORM_LIMIT,
}
"""The same numbers for generated code, which shifts a scale in the word straight to its place in a float32. Both scales
have one format."""
