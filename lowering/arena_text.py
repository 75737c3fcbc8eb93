"""The plane arena's offsets as C++ text, computed by the one layout that Python uses too."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from .. import layout as layout_module
from .. import residual, residual_fields
from ..layout import ArenaLayout, hadamard_blocks, padded_head_dim
from ..storage import WINDOW
from .cpp_kernel import render
from .isa import chosen_target


@dataclass(frozen=True)
class Text:
    """A C++ expression that arithmetic extends; what :class:`ArenaLayout` returns for sizes known only at run time."""

    text: str

    def _combine(self, operator: str, other: object, swapped: bool = False) -> Text:
        operands = [self.text, other.text if isinstance(other, Text) else str(other)]
        left, right = reversed(operands) if swapped else operands
        return Text(f"({left} {operator} {right})")

    def __add__(self, other: object) -> Text:
        return self._combine("+", other)

    def __radd__(self, other: object) -> Text:
        return self._combine("+", other, swapped=True)

    def __mul__(self, other: object) -> Text:
        return self._combine("*", other)

    def __rmul__(self, other: object) -> Text:
        return self._combine("*", other, swapped=True)

    def __floordiv__(self, other: object) -> Text:
        return self._combine("/", other)  # sizes are not negative

    def __str__(self) -> str:
        return self.text


def arena_header(layout: ArenaLayout) -> str:
    """C++ that finds the sections of an arena of ``heads`` x ``capacity`` rows of some layout, and mixes K rows."""
    arena = replace(layout, heads=Text("heads"), capacity=Text("capacity"))  # type: ignore[arg-type]
    sections = ("scales", "value_sum", "key_hi", "key_mid", "value_hi", "value_mid", "residual", "turns")
    return render(
        "arena.h.jinja",
        layout=layout_module,
        key_dim=arena.key_dim,
        value_dim=arena.value_dim,
        key_padded=padded_head_dim(arena.key_dim),
        value_padded=padded_head_dim(arena.value_dim),
        rows=arena.rows,
        mid_rows=arena.mid_rows,
        blocks=arena.blocks,
        offset={name: getattr(arena, name) for name in sections},
        hadamard=_hadamard(arena.key_dim),
        lanes=chosen_target().lanes,
        storage=arena.storage,
        window=WINDOW,
        residual_row=arena.residual_row,
    )


def packed_rows(arena: ArenaLayout, dtype: torch.dtype) -> str:
    """C++ that decodes rows of an arena that is the cache, of numbers of ``dtype``; nothing for planes beside one."""
    if not arena.storage.packed:
        return ""
    return render(
        "packed_rows.h.jinja",
        layout=layout_module,
        storage=arena.storage,
        lanes=chosen_target().lanes,
        bfloat16=dtype == torch.bfloat16,
        hadamard=[(start, size, residual.block_gain(size)) for start, size in _hadamard(arena.key_dim)],
        fields=residual_fields,
        codes=residual.CODES,
        unit=residual.UNIT,
        width_step=residual.WIDTH_STEP,
        dither_steps=layout_module.HI_STEP // (layout_module.MID_STEP // 2),
    )


def _hadamard(key_dim: int) -> list[tuple[int, int]]:
    """Start and size of each block of the transform."""
    sizes = hadamard_blocks(key_dim)
    return [(sum(sizes[:i]), size) for i, size in enumerate(sizes)]
