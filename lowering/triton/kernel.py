"""A Triton template as one kernel inside Inductor's graph.

Inductor's ``TritonTemplate`` is made for kernels with one output, written at the end. Three things differ here: a kernel's
output may be scratch that it addresses itself, its sizes need not be those of any tensor, and functions shared by all
kernels follow the kernel in its source.
"""

from __future__ import annotations

import functools
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sympy
import torch

from ... import ops
from ...inductor_private import (
    SymbolicGridFn,
    TritonTemplate,
    TritonTemplateKernel,
    empty_strided,
    ir,
    texpr,
)
from ...storage import BESIDE, PACKED, Storage
from ..constants import SCAN, SHARED, print_triton
from .shared import shared_functions

_TEMPLATES = Path(__file__).parent / "templates"


class Kernel(TritonTemplateKernel):
    """A kernel whose template may name its output and the sizes of the call."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._register_extra_template_env_fns(self.output_pointer, self.call_size)

    def output_pointer(self) -> str:
        """Name of the argument that points to the output."""
        return str(self.args.output(self.output_node.get_name()))

    def call_size(self, index: int) -> str:
        """Text of one of the call's sizes; a symbolic one becomes an argument."""
        return str(texpr(self.rename_indexing(sympy.sympify(self.call_sizes[index]))))


class Template(TritonTemplate):
    """A template that makes :class:`Kernel`."""

    kernel_type = Kernel


@SymbolicGridFn
def pairs_by_splits(pairs: Any, *sizes: Any) -> tuple[Any, Any, Any]:
    """One program for each pair and share of its context."""
    return pairs, sizes[-1]["GRID_Y"], 1


@SymbolicGridFn
def pairs_by_pieces(pairs: Any, rows: Any, *sizes: Any, cdiv: Any) -> tuple[Any, Any, Any]:
    """One program for each pair and piece of the new rows; one piece more, as pieces are cut where blocks begin."""
    return pairs, cdiv(rows, sizes[-1]["BLOCK"]) + 1, 1


@SymbolicGridFn
def one_program(*_: Any) -> tuple[Any, Any, Any]:
    return 1, 1, 1


CACHE_BUFFERS = frozenset({"KEY", "VALUE"})
"""What kernels over an arena that is the cache do without."""

RAW_BUFFERS = frozenset({"RAW_ROWS", "RAW_SCORES", "RAW_NORMS", "SPOILT"})
"""What kernels over other arenas than a lossless cache do without."""

GRIDS = {"quantize_on_write": pairs_by_pieces, "count": one_program}


@functools.cache
def template_text(name: str) -> str:
    """``templates/<name>.py.jinja`` with the shared setup."""
    text = (_TEMPLATES / f"{name}.py.jinja").read_text()
    for part in ("setup", "scan_share", "stream_share"):
        included = (_TEMPLATES / f"{part}.py.jinja").read_text().rstrip()

        def indented(place: re.Match[str], included: str = included) -> str:
            return textwrap.indent(included, place[1])

        text = re.sub(rf"^( *)\{{\{{{part}\}}\}}$", indented, text, flags=re.MULTILINE)
    return text


@functools.cache
def named_constants(name: str) -> Mapping[str, str]:
    """Constants that a template names."""
    words = frozenset(re.findall(r"\w+", template_text(name)))
    return {constant: text for constant, text in print_triton({**SHARED, **SCAN}).items() if constant in words}


@functools.cache
def template(name: str, storage: Storage) -> Template:
    """The template with the shared functions; Inductor knows it by a name of its own for each storage."""
    text = template_text(name)
    known_as = f"alignedkv_{name}" if storage == BESIDE else f"alignedkv_{name}_{PACKED.index(storage.name)}"
    made = Template(known_as, GRIDS.get(name, pairs_by_splits), text + "\n\n" + shared_functions(storage))
    absent = (CACHE_BUFFERS if storage.packed else frozenset()) | (frozenset() if storage.residual else RAW_BUFFERS)
    known = text[: text.index("\n    ", text.index("def_kernel("))]
    made.template.globals.update(
        counter_fields=len(ops.COUNTER_FIELDS),
        log2e=SHARED["LOG2E"],
        buffers=frozenset(known.split('"')[1::2]) - absent,
        storage=storage,
    )
    return made


@dataclass(frozen=True)
class Launch:
    """How a kernel is divided up: rows of the cache at once, warps of a program, stages of its software pipeline."""

    rows: int
    warps: int
    stages: int


def emit(
    name: str,
    inputs: Mapping[str, ir.IRNode],
    mutated: Sequence[str],
    output: ir.Layout,
    sizes: Sequence[object],
    constants: Mapping[str, object],
    launch: Launch,
    storage: Storage = BESIDE,
) -> ir.TensorBox:
    """Put a kernel into the graph that is being lowered; the result is its output.

    Args:
        name: of the template.
        inputs: IR nodes by the names in the template's ``def_kernel``, in its order.
        mutated: names of inputs that it writes.
        output: layout of what ``output_pointer`` or ``store_output`` writes.
        sizes: what ``call_size`` returns by index, and what the grid is computed from.
        constants: the template's glossary, but for :func:`named_constants`.
        launch: how it is divided up.
        storage: of the arena that it works on.
    """
    choices: list[Any] = []
    error = template(name, storage).maybe_append_choice(
        choices,
        input_nodes=list(inputs.values()),
        layout=output,
        mutated_inputs=[inputs[one] for one in mutated] or None,
        call_sizes=list(sizes),
        num_warps=launch.warps,
        num_stages=launch.stages,
        ROWS=launch.rows,
        KERNEL_NAME=repr(name),
        **named_constants(name),
        **constants,
    )
    if error is not None:
        raise error
    return choices[0].output_node()  # nothing to choose: no benchmark, and no key in a tuning cache


def scratch(device: torch.device, dtype: torch.dtype, *size: object) -> ir.TensorBox:
    """Memory of the graph's own that kernels pass to each other."""
    node = empty_strided([sympy.sympify(one) for one in size], None, dtype=dtype, device=device)
    node.realize()
    return node


def contiguous(device: torch.device, dtype: torch.dtype, *size: object) -> ir.FixedLayout:
    """Layout of a fresh contiguous buffer."""
    sizes = [sympy.sympify(one) for one in size]
    return ir.FixedLayout(device, dtype, sizes, ir.FlexibleLayout.contiguous_strides(sizes))
