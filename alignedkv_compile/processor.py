"""What the processor says of itself."""

from __future__ import annotations

import functools
import platform
from pathlib import Path


@functools.cache
def processor() -> tuple[str, frozenset[str]]:
    """Name and feature flags from ``/proc/cpuinfo``; the platform module's name and no flags elsewhere."""
    fields: dict[str, str] = {}
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    for line in text.splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    return fields.get("model name") or platform.processor() or platform.machine(), frozenset(fields.get("flags", "").split())
