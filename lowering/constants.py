"""Named numbers of the generated code of both targets, each from the file that decides it, and a printer for either language.

C++ gets all of a table as ``constexpr``. Triton kernels get those that they name as ``tl.constexpr`` (:mod:`.triton.kernel`),
and the functions that they share get them as text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from .. import layout, precision, row_header, worst_case
from ..layout import ArenaLayout

Number = int | float

SHARED: Mapping[str, Number] = {
    # layout.py
    "DITHER_MULTIPLIER": layout.DITHER_MULTIPLIER,
    "DITHER_UNIT": layout.DITHER_UNIT,
    "CODE_RANGE": layout.CODE_RANGE,
    "HEADROOM": layout.HEADROOM,
    "HI_STEP": layout.HI_STEP,
    "HI": layout.HI_STEP / layout.CODE_RANGE,
    "MID": layout.MID_STEP / layout.CODE_RANGE,
    "PLANE_RATIO": layout.PLANE_RATIO,
    "HI_SHIFT": layout.HI_STEP.bit_length() - 1,
    "MID_SHIFT": layout.MID_STEP.bit_length() - 1,
    "NIBBLE_CENTER": layout.NIBBLE_CENTER,
    "PLANES_VALID": layout.PLANES_VALID,
    "SCALES_BYTES": layout.SCALES_BYTES,
    "LONGEST_WAIT": layout.LONGEST_WAIT,
    **row_header.CONSTANTS,
    # precision.py
    "INT8_LARGEST": float(precision.INT8_MAX),  # INT8_MAX is a macro of C
    "TERM_RATIO": precision.TERM_RATIO,
    "STREAM_FRACTION": float(precision.STREAM_FRACTION),
    "LARGEST_SHIFT": float(precision.LARGEST_SHIFT),
    "LOG2_LARGEST_SHIFT": math.log2(precision.LARGEST_SHIFT),
    "LARGEST_NORM": float(precision.LARGEST_NORM_RATIO),
    "MIN_NORM": precision.NORM_RANGE[0],
    "MAX_NORM": precision.NORM_RANGE[1],
    "SMALLEST_SUM": precision.SMALLEST_SUM,
    "FLOAT_ROUNDER": precision.FLOAT_ROUNDER,
    "LOG2E": math.log2(math.e),
}
"""What every kernel may name."""

SCAN: Mapping[str, Number] = {
    "STEPS": precision.STEPS,
    "SCORE_LIMIT": float(precision.LARGEST_STEP),
    "SMALLEST_TOP": float(precision.SMALLEST_TOP),
}
"""The same of the read in the order of steps of a GPU."""

CERTIFIED: Mapping[str, Number] = {
    "KEY_ROUNDS": worst_case.REFINEMENTS,
    "LADDER": worst_case.LADDER,
    "VALUE_TILE": worst_case.VALUE_TILE,
    "SUM_SLACK": float(worst_case.SUM_SLACK),
    "FLOAT_SLACK": float(worst_case.FLOAT_SLACK),
    "SMALLEST_SCALE": worst_case.SMALLEST_SCALE,
    "LARGEST_SCORE_BOUND": worst_case.LARGEST_SCORE_BOUND,
    **{f"{name.upper()}_SHARE": share for name, share in worst_case.SHARES.items()},
}
"""The same of the certified read."""


def policy_constants(arena: ArenaLayout, element_size: int) -> dict[str, Number]:
    """What the read policy takes from head dimensions and from the bytes of a number of the cache."""
    key_ratio, value_ratio = precision.mid_ratios(arena, element_size)
    return {
        **{f"VALUE_COEFFICIENT_{bits}": precision.evaluate("value_coefficient", b=bits, D=arena.value_dim) for bits in (4, 8)},
        "KEY_MID_RATIO": key_ratio,
        "VALUE_MID_RATIO": value_ratio,
    }


def certified_constants(key_dim: int, value_dim: int) -> dict[str, Number]:
    """What the certificate takes from head dimensions."""
    bound = worst_case.value_bound.subs({worst_case.s_V: 1, worst_case.D: value_dim})
    return {
        **{f"VALUE_BOUND_{bits}": float(bound.subs(worst_case.b, bits)) for bits in (4, 8)},
        "QUERY_SLACK": worst_case.query_slack(key_dim),
    }


def option_constants(tolerance: float, unit_roundoff: float, min_context: int) -> dict[str, Number]:
    """A call's options."""
    return {"ALPHA": tolerance, "ROUNDOFF": unit_roundoff, "MIN_CONTEXT": min_context}


def print_cpp(constants: Mapping[str, Number]) -> str:
    """Constants as C++: floats, and integers of 32 bits where that is enough."""

    def line(name: str, number: Number) -> str:
        if isinstance(number, float):
            return f"constexpr float {name} = {number:.9e}f;"
        return f"constexpr {'int32_t' if abs(number) < 2**31 else 'int64_t'} {name} = {number};"

    return "\n".join(line(name, number) for name, number in constants.items())


def print_triton(constants: Mapping[str, Number]) -> dict[str, str]:
    """Constants as Triton text by name."""
    return {name: repr(number) for name, number in constants.items()}
