"""Write the planes of many cache rows at once: the write op over all rows, through the code that Inductor generates for it."""

from __future__ import annotations

from collections.abc import Hashable

import torch

from . import torch_private
from .layout import PLANES_VALID
from .own_kernels import OwnKernels, compile_alone


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
        self._kernels = OwnKernels()

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
        dynamic = ((0,), (2,), (2,), (0,)) if contiguous else ((), (), (), (0,))
        return self._kernels.get(signature, lambda: compile_alone(_write_rows, args, dynamic), args)


def _shape_but_rows(tensor: torch.Tensor) -> tuple[int, ...]:
    return (*tensor.shape[:2], *tensor.shape[3:])


PLANE_BUILDER: PlaneBuilder = PlaneBuilder()
"""The process's compiled rebuilds."""
