"""From which context on fewer bytes are fewer microseconds: the default of the option ``min_context``.

The aligned read does more per call than the 16-bit stream and less per byte, so it pays from some context on, if at all. On a
CPU where that is depends on the machine and on the read: :mod:`alignedkv_compile.cost` measures it, and without measurements
:data:`LEAST_CONTEXT` holds. A GPU's aligned read has three launches and waits twice for the last program of a pair; it gains
from ``ROWS_PER_PROCESSOR`` rows of K per multiprocessor on, over all pairs of the call; the pairs share them, so a batch gains
at shorter contexts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .layout import BLOCK_ROWS

LEAST_CONTEXT = 512
"""Rows below which there is nothing to save on any device: block means and thresholds need some."""

NEVER = 2**31 - 1
"""A context that no cache reaches: reading every bit is the faster read at any."""

MOST_ALIGNED_QUERY_ROWS = 4
"""New tokens up to which a read of few bits may be faster than one of every bit on a CPU: its time grows with the tokens, most
of all where query heads share a KV head, that of the other hardly does (``make bench-rows``)."""

ROWS_PER_PROCESSOR = 1024
"""An estimate until ``make sweep-gpu`` has measured it. On an H200 (132 multiprocessors) prototypes of the two reads took 66
and 110 microseconds per million rows of 512 bytes, so a row saves 44 picoseconds; two more launches and their tails are put at
6 microseconds. That is 136,000 rows, 1,030 per multiprocessor; with fewer of them a row saves more time in proportion."""


@dataclass(frozen=True)
class ReadShape:
    """What the time of a read depends on, beside the context and the numbers in it.

    Attributes:
        device: of the cache.
        dtype: of its numbers.
        pairs: KV heads times batch of the call.
        group: query heads per KV head.
        key_dim, value_dim: head dimensions of K and V.
        capacity: rows that the cache can hold, None where that is open.
        query_rows: new tokens of the call.
    """

    device: torch.device
    dtype: torch.dtype
    pairs: int
    group: int
    key_dim: int
    value_dim: int
    capacity: int | None = None
    query_rows: int = 1

    @property
    def rows_per_head(self) -> int:
        """Query rows that share a KV head: those of a group's heads."""
        return self.group * self.query_rows

    def can_reach(self, context: int) -> bool:
        """Whether the cache ever holds so many rows."""
        return context < NEVER and (self.capacity is None or context <= self.capacity)


def least_context(read: ReadShape) -> int:
    """Live rows below which a call should read every bit, where nothing has been measured."""
    if read.device.type == "cpu":
        return LEAST_CONTEXT
    rows = ROWS_PER_PROCESSOR * _processors(read.device)
    return max(LEAST_CONTEXT, -(-rows // (max(read.pairs, 1) * BLOCK_ROWS)) * BLOCK_ROWS)


def _processors(device: torch.device) -> int:
    """Multiprocessors; an H200's where code is generated for a device that is not there."""
    module = torch.get_device_module(device)
    if not module.is_available():
        return 132
    properties = module.get_device_properties(device)
    return int(getattr(properties, "multi_processor_count", 132))
