"""``quantize_on_write`` as a C++ kernel."""

from __future__ import annotations

from collections.abc import Mapping

import sympy

from .. import ops
from ..inductor_private import V, ir, register_lowering
from ..torch_private import generates_triton
from .arena_text import arena_header
from .constants import SHARED, print_cpp
from .cpp_kernel import Kernel, Template, device_of, dummy_layout, emit, realize, render
from .vectors import vector_header


class QuantizeOnWrite(Template):
    """The kernel for one set of head dimensions and one cache dtype."""

    has_output = False

    def __init__(self, inputs: Mapping[str, ir.IRNode], capacity: sympy.Expr, key_dim: int, value_dim: int) -> None:
        super().__init__("quantize_on_write", inputs, ["planes"], dummy_layout(inputs["planes"]))
        self.capacity, self.key_dim, self.value_dim = capacity, key_dim, value_dim

    def source(self, kernel: Kernel, nodes: Mapping[str, ir.Buffer], output: ir.Buffer) -> str:
        key, value, positions = nodes["key"], nodes["value"], nodes["positions"]
        sizes = [*key.get_size()[:3], *key.get_stride()[:3], *value.get_stride()[:3], *positions.get_stride(), self.capacity]
        definition, aliases = self.definition(kernel, nodes, output, sizes)
        text = kernel.size_expression
        return render(
            "quantize_on_write.cpp.jinja",
            includes=self.includes(),
            constants=print_cpp(SHARED),
            vectors=vector_header(),
            arena=arena_header(self.key_dim, self.value_dim),
            element=kernel.dtype(key),
            definition=definition,
            aliases=aliases,
            batch=text(key.get_size()[0]),
            heads=text(key.get_size()[1]),
            new_rows=text(key.get_size()[2]),
            capacity=text(self.capacity),
            key_strides=[text(s) for s in key.get_stride()[:3]],
            value_strides=[text(s) for s in value.get_stride()[:3]],
            position_stride=text(positions.get_stride()[0]),
        )


def _lower(planes: ir.TensorBox, key: ir.TensorBox, value: ir.TensorBox, positions: ir.TensorBox, capacity: sympy.Expr) -> None:
    static = V.graph.sizevars.guard_int
    key_dim, value_dim = static(key.get_size()[3]), static(value.get_size()[3])
    inputs = {
        "planes": realize(planes, contiguous_last=False),
        "key": realize(key),
        "value": realize(value),
        "positions": realize(positions, contiguous_last=False),
    }
    if generates_triton(device_of(planes)):
        from .triton.quantize import lower  # triton need not be installed for CPUs

        lower(inputs["planes"], inputs["key"], inputs["value"], inputs["positions"], sympy.sympify(capacity))
        return
    emit(QuantizeOnWrite(inputs, sympy.sympify(capacity), key_dim, value_dim))


def register() -> None:
    """Register the lowering."""
    register_lowering(ops.quantize_on_write.default, type_promotion_kind=None)(_lower)
