"""How the kernels are divided up: one small table, chosen by what compiles well (docs/gpu.md). No GPU has tuned it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from .kernel import Launch


@dataclass(frozen=True)
class ReadLaunches:
    """Launches of the kernels of a read, and the tile sizes inside them.

    Attributes:
        scan, finish, stream: how each is divided up; ``stream.rows`` are cache rows that are streamed at once.
        tiles: CHUNK blocks chosen from at once; KEYS, EXACT, VALUES rows gathered at once; PART rows of programs' parts
            combined at once; stages of the loops of scan and stream.
    """

    scan: Launch
    finish: Launch
    stream: Launch
    tiles: Mapping[str, int] = field(default_factory=dict)

    def of(self, kernel: str) -> Launch:
        """The launch of one kernel."""
        launches = {"scan": self.scan, "finish": self.finish, "stream": self.stream, "repair": self.stream, "raw": self.stream}
        return launches.get(kernel, Launch(0, 4, 1))


PROGRAMS_PER_PROCESSOR = 4
"""Programs that a multiprocessor should have in flight, as far as the context can be split."""
MAX_SPLITS = 64


def read_launches(dim: int, query_rows: int, element_size: int, *, hip: bool = False, decodes: bool = False) -> ReadLaunches:
    """Launches for heads of ``dim``, ``query_rows`` padded query rows per KV head, and a cache of ``element_size`` bytes a
    number, which are decoded or not. Tiles are as large as registers allow (``make gpu-codegen``); with 8 warps ``hip`` would
    have half as many."""
    wide = dim > 128 or query_rows > 8 or element_size > 2
    rows = 32 if wide else 64
    if dim > 256 or query_rows > 32 or decodes:
        rows = 16
    warps = 8 if (dim > 128 or query_rows > 8) and not hip else 4
    tiles = {
        "CHUNK": 2 if query_rows <= 8 else 1,
        "KEYS": 32,
        "EXACT": 16,
        "VALUES": 32,
        "PART": 16,
        "STAGES_OF_SCAN": 3,
        "STREAM_STAGES": 3 if not wide else 2,
    }
    reading = 8 if decodes and not hip else warps
    return ReadLaunches(Launch(0, warps, 3), Launch(0, reading, 1), Launch(rows, reading, 3), tiles)


def write_launch(key_dim: int, value_dim: int, *, encodes: bool = False) -> Launch:
    """Launch of the write: few rows at once, as a row goes through log2(dim) exchanges of registers, and more warps where the
    fewest do not fit; fewer where residuals are encoded."""
    dim = max(key_dim, value_dim)
    if encodes:
        return Launch(4 if dim <= 128 else 2, 8 if dim > 256 else 4, 1)
    return Launch(8 if dim > 256 else 16, 8 if dim > 512 else 4, 1)


def splits(pairs: int, processors: int) -> int:
    """Programs that share one pair's context: a power of two that fills the device."""
    wanted = math.ceil(PROGRAMS_PER_PROCESSOR * processors / max(pairs, 1))
    return min(MAX_SPLITS, 1 << (wanted - 1).bit_length())
