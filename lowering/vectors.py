"""The vector layer of the chosen instruction set as C++ text."""

from __future__ import annotations

from .. import layout
from .cpp_kernel import render
from .isa import chosen_target


def vector_header() -> str:
    """C++ of vectors, and of what a target does with planes (``simd/portable.h``)."""
    target = chosen_target()
    return render("vectors.h.jinja", layout=layout, lanes=target.lanes, target=target.text())
