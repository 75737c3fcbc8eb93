"""The user's options as the passes ask them, with the break-even context of this machine."""

from __future__ import annotations

import logging
import os
import time
from dataclasses import fields, replace

from .. import break_even
from ..break_even import ReadShape
from ..lowering.isa import chosen_isa, machine_isa, streams_by_tiles
from ..options import Options
from .crossover import Timing
from .measure import Accuracy, measure
from .records import RECORDS, Kind, Record, kind_of

_log = logging.getLogger(__name__)

ENVIRONMENT_VARIABLE = "ALIGNEDKV_CALIBRATE"
"""Set to 0, nothing is measured, whatever the options say: for tests, and where compiling has to be reproducible."""


_FAILED: set[Kind] = set()
"""Reads that could not be timed: every layer of a model would try, and wait for it, again."""


class MeasuredOptions(Options):
    """Options whose break-even context is measured, the first time that a machine meets a kind of read."""

    def least_context(self, read: ReadShape) -> int:
        if self._chooses(read) and read.query_rows > break_even.MOST_ALIGNED_QUERY_ROWS:
            return break_even.NEVER
        record = self._measured(read)
        return super().least_context(read) if record is None else record.least_context

    def break_even(self, read: ReadShape) -> float:
        record = self._measured(read)
        return super().break_even(read) if record is None else record.break_even

    def most_query_rows(self, read: ReadShape) -> int:
        return most_query_rows(read) if self._knows(read) else super().most_query_rows(read)

    def _measured(self, read: ReadShape) -> Record | None:
        """What was measured of a read, None where that is not wanted, pointless or impossible."""
        if not self._chooses(read) or read.query_rows > break_even.MOST_ALIGNED_QUERY_ROWS:
            return None
        accuracy = Accuracy(self.tolerance, self.unit_roundoff(read.dtype))
        kind = kind_of(read, accuracy)
        if kind in _FAILED or not read.can_reach(break_even.LEAST_CONTEXT):
            return None
        try:
            return measured(read, accuracy)
        except Exception as error:  # no user's model fails for want of a measurement
            _FAILED.add(kind)
            _log.warning("reads could not be timed, every bit is read below %d rows: %s", break_even.LEAST_CONTEXT, error)
            return None

    def _chooses(self, read: ReadShape) -> bool:
        """Whether the faster of two reads may be taken."""
        return self._knows(read) and self.tolerance > 0

    def _knows(self, read: ReadShape) -> bool:
        """Whether times are known here, and the user has not settled what they decide."""
        return read.device.type == "cpu" and self.min_context is None and not self.certified


MOST_QUERY_ROWS = {"amx": 16, "avx512": 16, "avx2": 16, "portable": 4}
"""New tokens up to which a read of every bit beats stock attention, by the instruction set that it is written for
(``make bench-rows``)."""
MOST_BESIDE_TILES = {"amx": 8, "avx512": 8, "avx2": 4, "portable": 4}
"""The same on a machine whose stock attention multiplies matrix tiles, where this read does not."""


def most_query_rows(read: ReadShape) -> int:
    """New tokens up to which a CPU's read of a cache beats stock attention."""
    isa = chosen_isa()
    longest = replace(read, query_rows=MOST_QUERY_ROWS[isa])
    tiled = streams_by_tiles(read.dtype, longest.rows_per_head, read.key_dim, read.value_dim)
    return (MOST_QUERY_ROWS if tiled or machine_isa() != "amx" else MOST_BESIDE_TILES)[isa]


def priced(options: Options) -> Options:
    """The options with measured break-even contexts, or as they are where measuring is off."""
    if not options.calibrate or os.environ.get(ENVIRONMENT_VARIABLE) == "0":
        return options
    return MeasuredOptions(**{entry.name: getattr(options, entry.name) for entry in fields(Options)})


def measured(read: ReadShape, accuracy: Accuracy) -> Record:
    """What a kind of read costs on this machine; measures where that is not known yet.

    Raises:
        Exception: whatever compiling or running the kernel raises.
    """
    kind = kind_of(read, accuracy)

    def timed() -> tuple[Timing, ...]:
        started = time.perf_counter()
        timings = measure(read, accuracy)
        _log.info("timed reads once for this machine (%.1f s): %s", time.perf_counter() - started, kind)
        return timings

    return RECORDS.find_or(kind, timed)
