"""What the device that a kernel is generated for is, and has."""

from __future__ import annotations

import torch

from ...inductor_private import DeviceProperties

EMULATED_PROCESSORS = 2
"""Multiprocessors that a CPU stands for when its Triton code is interpreted."""


def processors(device: torch.device) -> int:
    """Multiprocessors."""
    count = DeviceProperties.create(device).multi_processor_count
    return EMULATED_PROCESSORS if device.type == "cpu" or not count else count


def has_tensor_memory(device: torch.device) -> bool:
    """Whether Triton's products are tcgen05's."""
    return has_ptx(device) and DeviceProperties.create(device).major == 10


def has_ptx(device: torch.device) -> bool:
    """Whether instructions may be written in PTX."""
    return device.type == "cuda" and not is_hip()


def is_hip() -> bool:
    """Whether the GPUs are AMD's."""
    return torch.version.hip is not None
