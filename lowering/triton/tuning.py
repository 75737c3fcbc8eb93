"""How the kernels are divided up: one small table. No GPU has timed any of it: the entries are chosen so that nothing
spills on the five targets that ``make gpu-codegen`` compiles for, and ``max-autotune`` may measure the alternatives."""

from __future__ import annotations

import math
from dataclasses import replace

from .kernel import Launch

READ: dict[tuple[int, int], tuple[Launch, ...]] = {
    # (head dimension up to, query rows of a KV head up to): the default first, then what max-autotune also tries
    (64, 16): (Launch(64, 4, 2), Launch(128, 4, 2), Launch(64, 2, 3)),
    (128, 16): (Launch(32, 4, 2), Launch(64, 4, 2), Launch(64, 8, 2)),
    (256, 16): (Launch(32, 8, 2), Launch(16, 4, 2)),
    (512, 16): (Launch(16, 8, 1),),
    (128, 64): (Launch(32, 8, 2), Launch(64, 8, 2)),
    (512, 64): (Launch(16, 8, 1),),
    (512, 1 << 20): (Launch(16, 16, 1),),
}
"""Rows at once, warps, stages of the kernels that walk the context."""

HALF_ROWS = {
    (8, "coarse"): 4,
    (8, "values"): 4,
    (10, "score"): 8,
    (10, "coarse"): 4,
    (12, "score"): 8,
    (12, "coarse"): 4,
}
"""Device generation (major compute capability) and kernel: with so many warps or fewer it takes half of the table's rows, since
ptxas spills 8 to 48 bytes otherwise. ``exact``, which holds whole rows of K, does so everywhere."""

PROGRAMS_PER_PROCESSOR = 4
"""Programs that a multiprocessor should have in flight, as far as the context can be split."""
MAX_SPLITS = 64


def read_launches(dim: int, query_rows: int, *, choose: bool) -> tuple[Launch, ...]:
    """Launches for heads of ``dim`` and ``query_rows`` padded query rows per KV head; only the default unless ``choose``."""
    for (largest, rows), launches in READ.items():
        if dim <= largest and query_rows <= rows:
            return launches if choose else launches[:1]
    raise AssertionError(f"no launch for head dimension {dim}")


def for_kernel(name: str, launch: Launch, generation: int) -> Launch:
    """The launch of one kernel of the aligned read on a device generation (major compute capability; 0 for others)."""
    if launch.warps <= HALF_ROWS.get((generation, name), 0) or name == "exact":
        return replace(launch, rows=max(16, launch.rows // 2))
    return launch


def write_launch(key_dim: int, value_dim: int) -> Launch:
    """Launch of the write: few rows at once, as a row goes through log2(dim) exchanges of registers."""
    return Launch(8 if max(key_dim, value_dim) > 256 else 16, 4, 1)


def splits(pairs: int, processors: int) -> int:
    """Programs that share one pair's context: a power of two that fills the device."""
    wanted = math.ceil(PROGRAMS_PER_PROCESSOR * processors / max(pairs, 1))
    return min(MAX_SPLITS, 1 << (wanted - 1).bit_length())
