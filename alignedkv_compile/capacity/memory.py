"""Sizes of memory as people write them."""

from __future__ import annotations

import re

from .errors import CapacityError

UNITS = {
    "": 1,
    "B": 1,
    **{f"{p}B": 1000**i for i, p in enumerate("KMGT", 1)},
    **{f"{p}iB": 1024**i for i, p in enumerate("KMGT", 1)},
}
"""Bytes of each unit: decimal ones, and binary ones with an i."""
_LOWER = {unit.lower(): size for unit, size in UNITS.items()}


def parse_memory(text: str) -> int:
    """Bytes of ``"16GiB"``, ``"80 GB"``, ``"1.5GiB"`` or a plain number of bytes.

    Raises:
        CapacityError: it is none of these, or nothing.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)\s*", text)
    if match is None or match[2].lower() not in _LOWER:
        raise CapacityError(f"{text!r} is no size of memory such as 16GiB, 80GB or 512MiB")
    size = int(float(match[1]) * _LOWER[match[2].lower()])
    if size < 1:
        raise CapacityError(f"{text!r}: a memory limit is at least one byte")
    return size


def format_memory(size: float) -> str:
    """``size`` bytes in the largest binary unit that leaves at least 1 of it."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if size >= UNITS[unit]:
            return f"{size / UNITS[unit]:.2f} {unit}"
    return f"{size:.0f} B"
