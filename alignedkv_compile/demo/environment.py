"""What a figure depends on: processor, instruction set, threads, versions. Written into every JSON result."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

from ..lowering.isa import chosen_isa
from ..processor import processor

PACKAGES = ("torch", "transformers", "numpy", "sympy", "alignedkv-compile")
CPU_FLAGS = ("avx2", "fma", "avx512f", "avx512bw", "avx512_bf16", "avx512_vnni", "avx_vnni", "amx_bf16", "amx_int8")


@dataclass(frozen=True)
class Environment:
    """Where a result was measured.

    Attributes:
        cpu: the processor's own name.
        capability: the instruction set that ATen's kernels use ("AVX2", "AVX512", "DEFAULT").
        kernels: the instruction set that this package generates C++ for, of ``lowering/isa.py``.
        flags: those of :data:`CPU_FLAGS` that the processor reports.
        cores: logical cores that this process may use.
        threads: threads of ``torch``'s intra-op pool.
        memory_gib: physical memory, 0 when unknown.
        platform: operating system and architecture.
        python: version of the interpreter.
        packages: versions of :data:`PACKAGES`, "" for one that is not installed.
    """

    cpu: str
    capability: str
    kernels: str
    flags: tuple[str, ...]
    cores: int
    threads: int
    memory_gib: float
    platform: str
    python: str
    packages: dict[str, str]


def describe() -> Environment:
    """The environment of this process, now."""
    cpu, flags = processor()
    return Environment(
        cpu=cpu,
        capability=torch.backends.cpu.get_cpu_capability(),
        kernels=chosen_isa(),
        flags=tuple(flag for flag in CPU_FLAGS if flag in flags),
        cores=_cores(),
        threads=torch.get_num_threads(),
        memory_gib=_memory_gib(),
        platform=platform.platform(),
        python=platform.python_version(),
        packages={name: _version(name) for name in PACKAGES},
    )


def machine(environment: Environment) -> str:
    """Processor, cores and instruction sets in one line: what a speed-up belongs to."""
    cores = f"{environment.cores} core" + ("s" if environment.cores != 1 else "")
    return (
        f"{environment.cpu}, {cores}, {environment.threads} thread"
        + ("s" if environment.threads != 1 else "")
        + f", ATen {environment.capability}, kernels {environment.kernels}"
    )


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory_gib() -> float:
    try:
        first = Path("/proc/meminfo").read_text().splitlines()[0]
    except (OSError, IndexError):
        return 0.0
    return round(int(first.split()[1]) / 2**20, 1)


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""
