"""Which instruction set the generated C++ is written for."""

from __future__ import annotations

import os

import torch

from ..errors import OptionValueError

ENVIRONMENT_VARIABLE = "ALIGNEDKV_CPU_ISA"
"""Set to one of :data:`CHOICES` to force an instruction set (for tests and comparisons)."""

CHOICES = ("avx512", "avx2", "portable")


def machine_isa() -> str:
    """The best of :data:`CHOICES` that this machine runs: AVX-512 with VNNI, AVX2, or portable vector extensions."""
    capabilities = torch.cpu.get_capabilities()
    if all(capabilities.get(name) for name in ("avx512_f", "avx512_bw", "avx512_vl", "avx512_dq", "avx512_vnni")):
        return "avx512"
    if all(capabilities.get(name) for name in ("avx2", "fma3")):
        return "avx2"
    return "portable"


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
