"""Constants of the kernels that follow from the head dimensions and the layout."""

from __future__ import annotations

from ...layout import ArenaLayout


def power_of_two(number: int) -> int:
    """The next power of two, ``number`` itself included."""
    return 1 << (number - 1).bit_length()


def head_constants(arena: ArenaLayout) -> dict[str, object]:
    """DK, DV; KH and VH, bytes of a plane's row; KHP and VHP, those padded (an int8 product wants 32 columns, a sum of V 16);
    DP and VP, all columns padded; STAGES of the Hadamard transform; RECORD and RESIDUAL, bytes of those."""
    key_half, value_half = arena.key_plane_row, arena.value_plane_row
    columns = power_of_two(2 * key_half)
    return {
        "DK": arena.key_dim,
        "DV": arena.value_dim,
        "KH": key_half,
        "VH": value_half,
        "KHP": max(32, power_of_two(key_half)),
        "VHP": max(16, power_of_two(value_half)),
        "DP": columns,
        "VP": power_of_two(2 * value_half),
        "STAGES": columns.bit_length() - 1,
        "RECORD": arena.block_record,
        "RESIDUAL": arena.residual_row,
    }
