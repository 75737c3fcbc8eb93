"""The cases of the kernel tests, run through generated Triton in the interpreter."""

from __future__ import annotations

import torch
from cases import Case, Result, run_kernel, run_write, write_planes
from triton_interpreter import interpreted

from alignedkv_compile import arena
from alignedkv_compile.layout import ArenaLayout, arena_layout
from alignedkv_compile.lowering.triton.attention import EMULATED_PROCESSORS
from alignedkv_compile.lowering.triton.tuning import splits


def to_row_order(planes: torch.Tensor, layout: ArenaLayout) -> torch.Tensor:
    """An arena of the CPU as a GPU's: ``key_hi`` in row order instead of score order."""
    moved = planes.clone()
    source, target = arena.arena_views(planes, layout), arena.arena_views(moved, layout)
    target.key_hi_rows.copy_(arena.pack_row_order(arena.unpack_score_order(source.key_hi)))
    return moved


def row_ordered_planes(case: Case, *, valid: bool = True) -> torch.Tensor:
    """The arena of a case's caches as a GPU holds it, written by the reference."""
    return to_row_order(write_planes(case, valid=valid), arena_layout(case.key, case.value))


def run_triton(case: Case, planes: torch.Tensor | None, **config: object) -> Result:
    """The read through torch.compile and the Triton lowering, interpreted; rows are symbolic."""
    with interpreted(**config):
        return run_kernel(case, planes)


def programs(case: Case) -> int:
    """Programs to a pair of the interpreted kernels."""
    return splits(case.key.shape[0] * case.key.shape[1], EMULATED_PROCESSORS)


def write_triton(planes: torch.Tensor, key: torch.Tensor, value: torch.Tensor, positions: torch.Tensor, capacity: int) -> None:
    """The write through torch.compile and the Triton lowering, interpreted."""
    with interpreted():
        run_write(planes, key, value, positions, capacity)
