"""``quantize_on_write``, ``store_rows`` and ``load_rows`` as C++ kernels; the first two for GPUs in ``triton/``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import sympy
import torch

from .. import ops, residual, residual_fields
from ..inductor_private import V, empty_strided, fallback_handler, ir, register_lowering
from ..layout import ArenaLayout
from ..storage import BESIDE, STORAGES
from ..torch_private import OpOverload, generates_triton
from .arena_text import arena_header, packed_rows
from .constants import SHARED, print_cpp
from .cpp_kernel import PARTS, Kernel, Template, device_of, dummy_layout, emit, realize, render
from .vectors import vector_header


class RowsTemplate(Template):
    """A kernel between rows and an arena, for one set of head dimensions, one cache dtype and one storage.

    Args:
        template: its file.
        inputs: ``planes``, ``key [B, H, S, Dk]``, ``value``, ``positions [S]`` and others by name.
        mutated: those that it writes.
        capacity: rows of the arena.
        arena: its layout; heads and rows do not matter.
        sizes: other sizes that the template needs, by the names that it uses.
    """

    has_output = False

    def __init__(
        self,
        template: str,
        inputs: Mapping[str, ir.IRNode],
        mutated: list[str],
        capacity: sympy.Expr,
        arena: ArenaLayout,
        sizes: Mapping[str, sympy.Expr] | None = None,
    ) -> None:
        super().__init__(template.split(".")[0], inputs, mutated, dummy_layout(inputs["planes"]))
        self.template, self.capacity, self.arena, self.sizes = template, capacity, arena, dict(sizes or {})

    def source(self, kernel: Kernel, nodes: Mapping[str, ir.Buffer], output: ir.Buffer) -> str:
        key, value, positions = nodes["key"], nodes["value"], nodes["positions"]
        sizes = [*key.get_size()[:3], *key.get_stride()[:3], *value.get_stride()[:3], *positions.get_stride(), self.capacity]
        definition, aliases = self.definition(kernel, nodes, output, [*sizes, *self.sizes.values()])
        text = kernel.size_expression
        return render(
            self.template,
            includes=self.includes(),
            parts=PARTS,
            constants=print_cpp(SHARED),
            vectors=vector_header(),
            arena=arena_header(self.arena),
            rows=packed_rows(self.arena, key.get_dtype()),
            bfloat16=key.get_dtype() == torch.bfloat16,
            fields=residual_fields,
            smallest_scale=residual.SMALLEST_SCALE,
            largest_scale=residual_fields.LARGEST_SCALE,
            unit=residual.UNIT,
            width_step=residual.WIDTH_STEP,
            widths=residual.WIDTHS,
            storage=self.arena.storage,
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
            **{name: text(size) for name, size in self.sizes.items()},
        )


def _inputs(planes: ir.TensorBox, key: ir.TensorBox, value: ir.TensorBox, positions: ir.TensorBox) -> dict[str, ir.IRNode]:
    return {
        "planes": realize(planes, contiguous_last=False),
        "key": realize(key),
        "value": realize(value),
        "positions": realize(positions, contiguous_last=False),
    }


def _arena(key: ir.IRNode, value: ir.IRNode, storage: str) -> ArenaLayout:
    static = V.graph.sizevars.guard_int
    key_dim, value_dim = static(key.get_size()[3]), static(value.get_size()[3])
    return ArenaLayout(1, 1, key_dim, value_dim, STORAGES[storage], key.get_dtype().itemsize)


def _lower_quantize(
    planes: ir.TensorBox, key: ir.TensorBox, value: ir.TensorBox, positions: ir.TensorBox, capacity: sympy.Expr
) -> None:
    _lower_store(planes, key, value, positions, capacity, BESIDE.name)


def _lower_store(
    planes: ir.TensorBox,
    key: ir.TensorBox,
    value: ir.TensorBox,
    positions: ir.TensorBox,
    capacity: sympy.Expr,
    storage: str,
) -> None:
    triton = generates_triton(device_of(planes))
    if triton and not STORAGES[storage].has_triton(key.get_dtype(), device_of(planes)):
        _eagerly(ops.store_rows.default)(planes, key, value, positions, capacity, storage)
        return
    inputs = _inputs(planes, key, value, positions)
    arena = _arena(key, value, storage)
    if triton:
        from .triton.quantize import lower  # triton need not be installed for CPUs

        lower(inputs["planes"], inputs["key"], inputs["value"], inputs["positions"], sympy.sympify(capacity), arena)
        return
    emit(RowsTemplate("quantize_on_write.cpp.jinja", inputs, ["planes"], sympy.sympify(capacity), arena))


def _lower_load(
    planes: ir.TensorBox,
    key: ir.TensorBox,
    value: ir.TensorBox,
    positions: ir.TensorBox,
    rows: sympy.Expr,
    capacity: sympy.Expr,
    storage: str,
) -> tuple[ir.TensorBox, ir.TensorBox]:
    if generates_triton(device_of(planes)):
        return _eagerly(ops.load_rows.default)(planes, key, value, positions, rows, capacity, storage)
    inputs = _inputs(planes, key, value, positions)
    results = []
    for name, like in (("keys", key), ("values", value)):
        size = [*like.get_size()[:2], sympy.sympify(rows), like.get_size()[3]]
        empty = empty_strided(size, None, dtype=like.get_dtype(), device=device_of(like))
        inputs[name] = realize(empty, contiguous_last=False)
        results.append(empty)
    sizes = {"held": sympy.sympify(rows)}
    arena = _arena(key, value, storage)
    emit(RowsTemplate("load_rows.cpp.jinja", inputs, ["keys", "values"], sympy.sympify(capacity), arena, sizes))
    return results[0], results[1]


def _eagerly(overload: OpOverload) -> Callable[..., Any]:
    """An operator's eager meaning, called from the compiled graph: what there is no Triton for."""
    return fallback_handler(overload, add_to_fallback_set=False)


def register() -> None:
    """Register the lowerings."""
    register_lowering(ops.quantize_on_write.default, type_promotion_kind=None)(_lower_quantize)
    register_lowering(ops.store_rows.default, type_promotion_kind=None)(_lower_store)
    register_lowering(ops.load_rows.default, type_promotion_kind=None)(_lower_load)
