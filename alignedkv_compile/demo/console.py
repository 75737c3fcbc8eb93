"""The console that tables are printed to."""

from __future__ import annotations

import os
import sys

from rich.console import Console

WIDTH = 120
"""Columns for output that goes to a file or a pipe, where rich would assume 80 and cut the tables."""


def open_console() -> Console:
    """As wide as the terminal, or :data:`WIDTH` columns when there is none (``COLUMNS`` overrides)."""
    wide_enough = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(width=None if wide_enough else WIDTH)
