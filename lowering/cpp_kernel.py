"""A custom operator as one C++ kernel inside Inductor's graph.

Inductor's ``CppTemplate`` machinery is made for GEMMs with one output. Three things differ here: a kernel may mutate inputs,
may have no output, and its source must not name size symbols, so that the thirty layers of a model share one compiled kernel
although each layer's cache has symbols of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import jinja2
import sympy
import torch

from ..inductor_private import CppTemplate, CppTemplateKernel, Placeholder, cexpr_index, ir, parallel_num_threads
from .isa import chosen_target

_templates = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
    undefined=jinja2.StrictUndefined,
    trim_blocks=False,
    keep_trailing_newline=True,
)

PARTS = f"{Placeholder.KERNEL_NAME}_parts"
"""C++ namespace of what a kernel is made of: with Inductor's C++ wrapper, all kernels of a graph stand in one file."""


def render(template: str, **values: object) -> str:
    """A template of this package as text. Raises ``jinja2.UndefinedError`` for a value that it needs and did not get."""
    return _templates.get_template(template).render(**values)


class Kernel(CppTemplateKernel):
    """A kernel whose size arguments are named by their order (``size_0``), not by their symbols (``ks53``)."""

    def define(self, inputs: Mapping[str, ir.Buffer], outputs: Mapping[str, ir.Buffer], sizes: Sequence[sympy.Expr]) -> str:
        """The function's head; afterwards :meth:`size_expression` prints expressions over its arguments."""
        definition = self.def_kernel(inputs=dict(inputs), outputs=dict(outputs), extra_sizevars=list(sizes))
        symbols = [s for size in sizes for s in sorted(sympy.sympify(size).free_symbols, key=str)]
        order = list(dict.fromkeys([*symbols, *self.args.sizevars]))
        known = set(self.args.sizevars)
        self.args.sizevars.clear()
        for symbol in order:
            if symbol in known:
                self.args.sizevars[symbol] = f"size_{len(self.args.sizevars)}"
        return str(definition)

    def add_integer(self, value: int, name: str) -> None:
        """Pass a number that differs between otherwise equal kernels as an argument."""
        self.args.sizevars[sympy.Integer(value)] = name

    def size_expression(self, size: object) -> str:
        """C++ text of a size or stride."""
        return str(cexpr_index(self.rename_indexing(sympy.sympify(size))))


class Template(CppTemplate):
    """Base of the operators' templates: named inputs, some of them mutated, and an output or none.

    Args:
        name: kernel name in the generated code.
        inputs: IR nodes by the names that the template uses, in argument order.
        mutated: names of inputs that the kernel writes.
        layout: layout of the output, or of an unused dummy when ``has_output`` is False.
    """

    has_output = True

    def __init__(self, name: str, inputs: Mapping[str, ir.IRNode], mutated: Sequence[str], layout: ir.Layout) -> None:
        super().__init__(name, list(inputs.values()), layout, parallel_num_threads())
        self.names = tuple(inputs)
        self.mutated = tuple(mutated)

    def source(self, kernel: Kernel, nodes: Mapping[str, ir.Buffer], output: ir.Buffer) -> str:
        """The kernel's C++ text."""
        raise TypeError(f"{type(self).__name__} must define source()")

    def render(  # type: ignore[override]
        self,
        kernel: Kernel,
        template_buffer_node: ir.CppTemplateBuffer,
        epilogue_nodes: Sequence[ir.IRNode] | None = None,
        **_: object,
    ) -> str:
        if epilogue_nodes:
            raise AssertionError("epilogues are switched off for these kernels")
        buffers = cast(Sequence[ir.Buffer], template_buffer_node.inputs)
        return self.source(kernel, dict(zip(self.names, buffers, strict=True)), template_buffer_node)

    def definition(
        self, kernel: Kernel, nodes: Mapping[str, ir.Buffer], output: ir.Buffer, sizes: Sequence[sympy.Expr]
    ) -> tuple[str, str]:
        """The function's head, and the lines that make its arguments what the template means by their names: Inductor passes a
        buffer once, though several arguments may lie in it, and passes where it starts, not where a view of it does."""
        first: dict[str, str] = {}
        aliases = []
        offsets = {name: node.get_layout().offset for name, node in nodes.items()}
        inputs: dict[str, ir.Buffer] = {}
        outputs: dict[str, ir.Buffer] = {}
        for name, node in nodes.items():
            if node.get_name() in first:
                aliases.append(f"  auto* {name} = {first[node.get_name()]};")
                continue
            first[node.get_name()] = name
            (outputs if name in self.mutated else inputs)[name] = node
        if self.has_output:
            outputs["output"] = output
        definition = kernel.define(inputs, outputs, [*sizes, *offsets.values()])
        starts = [f"  {name} += {kernel.size_expression(offset)};" for name, offset in offsets.items() if offset != 0]
        return definition, "\n".join([*aliases, *starts])

    def includes(self) -> str:
        """Headers of every kernel."""
        header = self.header()
        header.splice(
            """
            #include <omp.h>
            #include <algorithm>
            #include <cmath>
            #include <cstring>
            #include <limits>
            #include <optional>
            #include <stdexcept>
            #include <string>
            #include <type_traits>
            #include <vector>
            """
        )
        header.writelines([f"#include <{name}>" for name in chosen_target().includes])
        return str(header.getvalue())


class TemplateBuffer(ir.CppTemplateBuffer):
    """A ``CppTemplateBuffer`` that declares which inputs its kernel mutates."""

    def __init__(self, template: Template, inputs: Sequence[ir.IRNode], mutated: Sequence[ir.IRNode]) -> None:
        def make_kernel_render(
            node: ir.CppTemplateBuffer,
            flag_template_buffer_has_other_users: bool = False,
            epilogue_nodes: Sequence[ir.IRNode] | None = None,
        ) -> tuple[Kernel, functools.partial[str]]:
            kernel = Kernel(kernel_name=str(Placeholder.KERNEL_NAME), num_threads=template.num_threads)
            return kernel, functools.partial(kernel.render, template, template_buffer_node=node, epilogue_nodes=epilogue_nodes)

        super().__init__(template.layout, inputs, make_kernel_render, template, None)  # type: ignore[arg-type]
        self.mutated_inputs = list(mutated)
        device = template.layout.device
        self.mutation_outputs = [
            ir.MutationOutput(ir.NoneLayout(device=device), buffer, self) for buffer in self.mutated_inputs
        ]
        self.allow_epilogue_fusion = False

    def get_outputs(self) -> list[ir.Buffer]:
        return [self, *self.mutation_outputs]


def emit(template: Template) -> ir.TensorBox:
    """Put the template's kernel into the graph that is being lowered; the result is its output."""
    nodes = dict(zip(template.names, template.input_nodes, strict=True))
    mutated = [nodes[name] for name in template.mutated]
    return ir.TensorBox.create(TemplateBuffer(template, template.input_nodes, mutated))


def realize(node: ir.IRNode, *, contiguous_last: bool = True) -> ir.IRNode:
    """A kernel argument: in memory, and with a contiguous last dimension if asked for."""
    realized = ir.ExternKernel.realize_input(node)
    return ir.ExternKernel.require_stride1(realized) if contiguous_last else realized


def device_of(node: ir.IRNode) -> torch.device:
    """The device of a tensor in the graph."""
    device = node.get_device()
    if device is None:
        raise AssertionError(f"{node} is no tensor")
    return device


def dummy_layout(node: ir.IRNode) -> ir.FixedLayout:
    """Layout, on the device of ``node``, of the output that Inductor wants even from a kernel that only mutates."""
    return ir.FixedLayout(device_of(node), torch.int32, [1], [1])
