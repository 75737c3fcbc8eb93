"""Inductor lowerings of the eight operators, all but the copy: Python decides (shapes, constants, instruction set), Jinja
templates compute.

``quantize.py`` turns those that move rows into kernels from ``templates/``, ``attention.py`` those that attend to them;
``cpp_kernel.py`` is the Inductor buffer and kernel that carry a template; ``isa.py`` chooses the instruction set, for each of
which ``simd/`` has a header. For GPUs they hand over to ``triton/``.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

from .isa import chosen_isa

_SOURCES = (
    "layout.py",
    "storage.py",
    "residual.py",
    "residual_fields.py",
    "row_header.py",
    "precision.py",
    "worst_case.py",
    "ops.py",
    "inductor_private.py",
)
"""Files of the package, besides this folder, whose text decides what code is generated."""


@functools.cache
def register() -> None:
    """Register the lowerings with Inductor; harmless when repeated. Imports Inductor, which takes a second.

    Whatever Inductor has registered itself is replaced: it makes a fallback of an operator that it meets earlier than this.
    """
    from . import attention, quantize

    quantize.register()
    attention.register()


def deciding_files() -> list[Path]:
    """Every file whose text decides what code is generated: this folder's, whatever their kind, and :data:`_SOURCES`."""
    here = Path(__file__).parent
    package = Path(__import__(__name__.split(".")[0]).__file__ or "").parent
    ours = sorted(path for path in here.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return [*ours, *(package / name for name in _SOURCES)]


@functools.cache
def _sources_digest() -> bytes:
    digest = hashlib.sha256()
    for path in deciding_files():
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.digest()


def source_hash() -> bytes:
    """Hash of everything that decides the generated code and that Inductor's cache key does not know: the sources of the
    lowerings, templates, headers, layout and error model, and the instruction set that is in force."""
    return hashlib.sha256(_sources_digest() + chosen_isa().encode()).digest()
