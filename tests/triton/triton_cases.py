"""The cases of the kernel tests, run through generated Triton in the interpreter."""

from __future__ import annotations

import torch
from cases import Case, Result, run_kernel, run_write, write_planes
from triton_interpreter import interpreted

from alignedkv_compile import arena
from alignedkv_compile.layout import ArenaLayout, arena_layout
from alignedkv_compile.lowering.triton.targets import EMULATED_PROCESSORS
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


def distort(case: Case, special: str, exponent: int) -> None:
    """Make K and V of a random case, in place, what ``special`` says; ``exponent`` is that of "tiny" and "huge"."""
    if special == "repeated rows":
        case.key[:] = case.key[:, :, :1]
        case.value[:] = case.value[:, :, :1]
    elif special == "sink":
        case.key[:, :, 0] *= 4
        case.value[:, :, 0] /= 64
    elif special == "outlier channel":
        case.key[..., 3] += 20
    elif special == "zeros":
        case.value[:] = 0
    elif special in {"tiny", "huge"}:
        case.value.mul_(2.0 ** (exponent if special == "huge" else -exponent))


def random_mask(rate: float | None, rows: int, seed: int) -> torch.Tensor | None:
    """bool ``[1, 1, 1, rows]``, True at this rate and in the middle; None where there is no rate."""
    if rate is None:
        return None
    mask = torch.rand(1, 1, 1, rows, generator=torch.Generator().manual_seed(seed)) < rate
    mask[..., rows // 2] = True
    return mask


def programs(case: Case) -> int:
    """Programs to a pair of the interpreted kernels."""
    return splits(case.key.shape[0] * case.key.shape[1], EMULATED_PROCESSORS)


def write_triton(planes: torch.Tensor, key: torch.Tensor, value: torch.Tensor, positions: torch.Tensor, capacity: int) -> None:
    """The write through torch.compile and the Triton lowering, interpreted."""
    with interpreted():
        run_write(planes, key, value, positions, capacity)
