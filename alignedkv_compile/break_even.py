"""From which context on fewer bytes are fewer microseconds: the default of the option ``min_context``.

The aligned read does more per call than the 16-bit stream (on a GPU it has three launches, and waits twice for the last program
of a pair) and less per row. On a GPU it gains from ``ROWS_PER_PROCESSOR`` rows of K per multiprocessor on, over all pairs of
the call; the pairs share them, so a batch gains at shorter contexts.
"""

from __future__ import annotations

import torch

from .layout import BLOCK_ROWS

LEAST_CONTEXT = 512
"""Rows below which there is nothing to save on any device: block means and thresholds need some."""

ROWS_PER_PROCESSOR = 1024
"""An estimate until ``make sweep-gpu`` has measured it. On an H200 (132 multiprocessors) prototypes of the two reads took 66
and 110 microseconds per million rows of 512 bytes, so a row saves 44 picoseconds; two more launches and their tails are put at
6 microseconds. That is 136,000 rows, 1,030 per multiprocessor; with fewer of them a row saves more time in proportion."""


def least_context(device: torch.device, pairs: int) -> int:
    """Live rows below which a call should read every bit.

    Args:
        device: of the cache.
        pairs: KV heads times batch of the call.
    """
    if device.type == "cpu":
        return LEAST_CONTEXT
    rows = ROWS_PER_PROCESSOR * _processors(device)
    return max(LEAST_CONTEXT, -(-rows // (max(pairs, 1) * BLOCK_ROWS)) * BLOCK_ROWS)


def _processors(device: torch.device) -> int:
    """Multiprocessors; an H200's where code is generated for a device that is not there."""
    module = torch.get_device_module(device)
    if not module.is_available():
        return 132
    properties = module.get_device_properties(device)
    return int(getattr(properties, "multi_processor_count", 132))
