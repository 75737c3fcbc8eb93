"""The plane arena's offsets as C++ text, computed by the one layout that Python uses too."""

from __future__ import annotations

from dataclasses import dataclass

from .. import layout as layout_module
from ..layout import ArenaLayout, hadamard_blocks, padded_head_dim
from .cpp_kernel import render


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


def arena_header(key_dim: int, value_dim: int) -> str:
    """C++ that finds the sections of an arena of ``heads`` x ``capacity`` rows, and mixes K rows."""
    arena = ArenaLayout(Text("heads"), Text("capacity"), key_dim, value_dim)  # type: ignore[arg-type]
    sections = ("scales", "value_sum", "key_hi", "key_mid", "value_hi", "value_mid")
    sizes = hadamard_blocks(key_dim)
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return render(
        "arena.h.jinja",
        layout=layout_module,
        key_dim=key_dim,
        value_dim=value_dim,
        key_padded=padded_head_dim(key_dim),
        value_padded=padded_head_dim(value_dim),
        rows=arena.rows,
        blocks=arena.blocks,
        offset={name: getattr(arena, name) for name in sections},
        hadamard=list(zip(starts, sizes, strict=True)),
    )
