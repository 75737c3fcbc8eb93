"""Which instruction set the generated C++ is written for: one table, and a header each under ``simd/``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import OptionValueError

ENVIRONMENT_VARIABLE = "ALIGNEDKV_CPU_ISA"
"""Set to one of :data:`CHOICES` to force an instruction set (for tests and comparisons)."""


@dataclass(frozen=True)
class Target:
    """An instruction set.

    Attributes:
        lanes: floats of a vector; 8 or 16.
        headers: files of ``simd/``, which together define what ``simd/portable.h`` describes.
        capabilities: what ``torch.cpu.get_capabilities`` must say of a machine that runs it.
        includes: the headers that those need, the compiler's for its intrinsics first.
        tiled: whether it multiplies matrix tiles (``simd/amx.h``).
    """

    lanes: int
    headers: tuple[str, ...]
    capabilities: tuple[str, ...] = ()
    includes: tuple[str, ...] = ()
    tiled: bool = False

    def text(self) -> str:
        """Its C++."""
        folder = Path(__file__).parent / "simd"
        return "\n".join((folder / name).read_text() for name in self.headers)


_AVX512 = ("avx512_f", "avx512_bw", "avx512_vl", "avx512_dq", "avx512_vnni")

TARGETS: Mapping[str, Target] = {
    "amx": Target(
        16,
        ("avx512.h", "amx.h"),
        (*_AVX512, "amx_tile", "amx_bf16"),
        includes=("immintrin.h", "sys/syscall.h", "unistd.h"),
        tiled=True,
    ),
    "avx512": Target(16, ("avx512.h",), _AVX512, includes=("immintrin.h",)),
    "avx2": Target(8, ("avx2.h", "narrow.h"), ("avx2", "fma3"), includes=("immintrin.h",)),
    "portable": Target(8, ("portable.h", "narrow.h")),
}
"""The instruction sets, best first; the last runs on every machine."""

CHOICES = tuple(TARGETS)


LEAST_TILED_ROWS = 5
"""Query rows of a KV head from which on matrix tiles are faster than vectors, which with fewer wait for memory as long
(``make bench``, ``make bench-rows``)."""


def streams_by_tiles(dtype: torch.dtype, rows_per_head: int, key_dim: int, value_dim: int) -> bool:
    """Whether every bit of a cache is read by matrix tiles (``templates/tiled_stream.h.jinja``).

    Args:
        dtype: of the cache and of the query.
        rows_per_head: query rows that share a KV head.
        key_dim, value_dim: head dimensions.
    """
    fits = dtype == torch.bfloat16 and key_dim % 32 == value_dim % 32 == 0
    return chosen_target().tiled and fits and rows_per_head >= LEAST_TILED_ROWS


def machine_isa() -> str:
    """The first of :data:`TARGETS` that this machine runs."""
    capabilities = torch.cpu.get_capabilities()
    return next(name for name, target in TARGETS.items() if all(map(capabilities.get, target.capabilities)))


def chosen_isa() -> str:
    """The forced instruction set if the environment names one, else the machine's best.

    Raises:
        OptionValueError: the environment names none of :data:`CHOICES`.
    """
    forced = os.environ.get(ENVIRONMENT_VARIABLE)
    if not forced:
        return machine_isa()
    if forced not in CHOICES:
        raise OptionValueError(ENVIRONMENT_VARIABLE, forced, f"one of {', '.join(CHOICES)}")
    return forced


def chosen_target() -> Target:
    """What :func:`chosen_isa` stands for."""
    return TARGETS[chosen_isa()]
