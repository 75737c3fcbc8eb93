"""Which devices get generated Triton, and which generated C++."""

from __future__ import annotations

import torch
from torch._inductor import config

TRITON_DEVICES = ("cuda", "xpu")
"""Device types whose operators become Triton; ROCm devices are called ``cuda`` by torch."""


def generates_triton(device: torch.device) -> bool:
    """Whether Inductor makes Triton for this device; for CPU tensors only where its ``cpu_backend`` says so, as tests do."""
    return device.type in TRITON_DEVICES or (device.type == "cpu" and config.cpu_backend == "triton")
