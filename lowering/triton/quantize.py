"""``quantize_on_write`` and ``store_rows`` as a Triton kernel."""

from __future__ import annotations

import sympy
import torch

from ...inductor_private import V, ir
from ...layout import BLOCK_ROWS, ArenaLayout
from ...storage import WINDOW
from .kernel import contiguous, emit
from .shapes import head_constants
from .targets import has_ptx
from .tuning import write_launch


def lower(
    planes: ir.IRNode, key: ir.IRNode, value: ir.IRNode, positions: ir.IRNode, capacity: sympy.Expr, arena: ArenaLayout
) -> None:
    """Arguments as :data:`alignedkv_compile.ops.quantize_on_write`, realized, with contiguous last dimensions; ``arena`` is the
    layout of one head's planes."""
    static = V.graph.sizevars.guard_int
    batch, heads, rows, _ = key.get_size()
    device = planes.get_device()
    assert device is not None
    constants = head_constants(arena)
    constants |= {
        "HEADS": static(heads),
        "BLOCK": BLOCK_ROWS,
        "SCAN": 1024,
        "DP": constants["DP"],
        "VP": constants["VP"],
        "RECORD": arena.block_record,
        "WINDOW": WINDOW,
        "PACKED": has_ptx(device),
        "PLACES": key.get_dtype() == torch.float16,
    }
    sizes = [batch * heads, rows, capacity, *key.get_stride()[:3], *value.get_stride()[:3], *positions.get_stride()]
    emit(
        "quantize_on_write",
        {"PLANES": planes, "KEY": key, "VALUE": value, "POSITIONS": positions},
        ["PLANES"],
        contiguous(device, torch.int32, 1),  # Inductor wants an output even of a kernel that only mutates
        sizes,
        constants,
        write_launch(arena.key_dim, arena.value_dim, encodes=arena.storage.residual),
        arena.storage,
    )
