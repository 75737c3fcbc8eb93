"""Write the planes of many cache rows at once: the write op over all rows, through the code that Inductor generates for it."""

from __future__ import annotations

import threading
from collections.abc import Hashable
from importlib.metadata import PackageNotFoundError, version

import torch

from . import lowering, torch_private
from .layout import PLANES_VALID


def post_grad_pass(*extra: object) -> torch_private.PostGradPass:
    """Our pass in Inductor, which keys its caches by our version, the sources of our lowerings, and ``extra``."""
    return torch_private.PostGradPass([_package_version().encode(), lowering.source_hash(), repr(extra).encode()])


def _package_version() -> str:
    try:
        return version("alignedkv-compile")
    except PackageNotFoundError:  # run from a source tree that was never installed
        return "unknown"


def _write_rows(
    planes: torch.Tensor, key: torch.Tensor, value: torch.Tensor, positions: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    rows = positions.shape[0]
    new_key, new_value = key.narrow(2, 0, rows), value.narrow(2, 0, rows)
    torch.ops.alignedkv.quantize_on_write.default(planes, new_key, new_value, positions, key.shape[2])
    return ()


class PlaneBuilder:
    """Compiles the write op once per dtype, device and head shape; the number of rows and the capacity stay symbolic."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._compiled: dict[Hashable, list[torch_private.GuardedGraph]] = {}

    def rebuild(self, planes: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: int) -> None:
        """See :class:`alignedkv_compile.state.stores.Builder`."""
        with torch_private.normal_tensors():
            planes.zero_()
            if rows > 0:
                args = (planes, key, value, torch.arange(rows, device=key.device))
                self._compiled_for(args)(*args)
            planes[:8].view(torch.int64).fill_(PLANES_VALID)

    def _compiled_for(self, args: tuple[torch.Tensor, ...]) -> torch_private.GuardedGraph:
        _, key, value, positions = args
        contiguous = key.is_contiguous() and value.is_contiguous()
        specialised = (min(key.shape[2], 2), min(positions.shape[0], 2))  # a size of 1 is never made a symbol
        backend = torch_private.generates_triton(key.device)  # on a CPU, tests may ask for either
        signature: Hashable = (backend, key.dtype, key.device, _shape_but_rows(key), _shape_but_rows(value), specialised)
        if not contiguous:
            signature = (signature, key.shape, key.stride(), value.shape, value.stride())
        with self._lock:
            variants = self._compiled.setdefault(signature, [])
            for variant in variants:
                if variant.accepts(args):
                    return variant
            lowering.register()
            dynamic = ((0,), (2,), (2,), (0,)) if contiguous else ((), (), (), (0,))
            patches = {torch_private.CUDA_GRAPHS: False}  # run once per cache, at addresses that change
            variants.append(torch_private.compile_function(_write_rows, args, dynamic, patches, post_grad_pass("rebuild")))
            return variants[-1]


def _shape_but_rows(tensor: torch.Tensor) -> tuple[int, ...]:
    return (*tensor.shape[:2], *tensor.shape[3:])


PLANE_BUILDER: PlaneBuilder = PlaneBuilder()
"""The process's compiled rebuilds."""
