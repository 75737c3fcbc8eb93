"""``aligned_read_attention`` and ``certified_read_attention`` as C++ kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch

from .. import layout, ops, worst_case
from ..inductor_private import V, ir, register_lowering
from ..torch_private import generates_triton
from .arena_text import arena_header
from .constants import SHARED, option_constants, print_cpp
from .cpp_kernel import Kernel, Template, device_of, emit, realize, render
from .formulas import certified_formulas, policy_formulas
from .vectors import vector_header

MAX_THREADS = 256
"""Threads that share one call; more would only wait for each other."""


@dataclass(frozen=True)
class Constants:
    """What is fixed when the kernel is generated."""

    key_dim: int
    value_dim: int
    group: int
    query_rows: int
    scale: float
    softcap: float
    tolerance: float
    unit_roundoff: float
    min_context: int
    length: sympy.Expr
    site: int


class ReadAttention(Template):
    """The kernel for one set of head dimensions, group size, query rows, dtypes, mask kind and options; with an input
    ``bounds`` it is the certified read."""

    def __init__(self, inputs: Mapping[str, ir.IRNode], layout: ir.Layout, constants: Constants) -> None:
        mutated = [name for name in ("bounds", "counters") if name in inputs]
        name = "certified_read_attention" if "bounds" in inputs else "aligned_read_attention"
        super().__init__(name, inputs, mutated, layout)
        self.constants = constants

    def source(self, kernel: Kernel, nodes: Mapping[str, ir.Buffer], output: ir.Buffer) -> str:
        constants = self.constants
        query, key, value, mask = nodes["query"], nodes["key"], nodes["value"], nodes.get("mask")
        mask_strides = _broadcast_strides(mask) if mask is not None else [sympy.Integer(0)] * 4
        sizes = [*key.get_size()[:3], constants.length, *query.get_stride(), *key.get_stride()[:3]]
        sizes += [*value.get_stride()[:3], *mask_strides]
        sinks = nodes.get("sinks")
        if sinks is not None:
            sizes.append(sinks.get_stride()[0])
        definition, aliases = self.definition(kernel, nodes, output, sizes)
        if "counters" in nodes:
            kernel.add_integer(constants.site, "site")
        certified = "bounds" in nodes
        text = kernel.size_expression
        has_planes = "planes" in nodes
        mask_type = kernel.dtype(mask) if mask is not None else None
        shared = {
            "layout": layout,
            "max_threads": MAX_THREADS,
            "mask_type": mask_type,
            "sinks_type": kernel.dtype(sinks) if sinks is not None else None,
            "softcap": f"{constants.softcap:.9e}f" if constants.softcap > 0 else None,
        }
        common = render(
            "attention_common.h.jinja",
            query_type=kernel.dtype(query),
            element=kernel.dtype(key),
            group=constants.group,
            query_rows=constants.query_rows,
            scale=f"{constants.scale:.9e}f",
            mask_floor=f"{mask_minimum(mask):.9e}f",
            mask_shared=mask_strides[1] == 0,
            **shared,
        )
        return render(
            "aligned_read_attention.cpp.jinja",
            includes=self.includes(),
            constants=print_cpp(SHARED),
            vectors=vector_header(),
            arena=arena_header(constants.key_dim, constants.value_dim),
            common=common,
            stream=render("stream.h.jinja", **shared),
            read_planes=_read_planes(constants, shared, key.get_dtype().itemsize, certified=certified) if has_planes else "",
            definition=definition,
            aliases=aliases,
            has_planes=has_planes,
            has_counters="counters" in nodes,
            certified=certified,
            bounds_width=text(nodes["bounds"].get_size()[2]) if certified else "",
            bounds_offset=text(constants.site * 2 * nodes["bounds"].get_size()[2]) if certified else "",
            counter_fields=len(ops.COUNTER_FIELDS),
            batch=text(key.get_size()[0]),
            heads=text(key.get_size()[1]),
            capacity=text(key.get_size()[2]),
            length=text(constants.length),
            query_strides=[text(s) for s in query.get_stride()],
            key_strides=[text(s) for s in key.get_stride()[:3]],
            value_strides=[text(s) for s in value.get_stride()[:3]],
            mask_strides=[text(s) for s in mask_strides],
            sinks_stride=text(sinks.get_stride()[0]) if sinks is not None else "",
            **shared,
        )


def _broadcast_strides(mask: ir.IRNode) -> list[sympy.Expr]:
    """Strides of a 4-D mask with 0 where it broadcasts."""
    known_one = V.graph.sizevars.statically_known_equals
    return [
        sympy.Integer(0) if known_one(size, 1) else stride
        for size, stride in zip(mask.get_size(), mask.get_stride(), strict=True)
    ]


def mask_minimum(mask: ir.IRNode | None) -> float:
    """At or below it a floating mask prohibits."""
    return 0.0 if mask is None or mask.get_dtype() == torch.bool else ops.mask_floor(mask.get_dtype())


def _read_planes(constants: Constants, shared: Mapping[str, object], element_size: int, *, certified: bool) -> str:
    """The read of one head's planes."""
    options = option_constants(constants.tolerance, constants.unit_roundoff, constants.min_context)
    formulas = (
        certified_formulas(constants.key_dim, constants.value_dim)
        if certified
        else policy_formulas(constants.key_dim, constants.value_dim, element_size)
    )
    template = "certified_read.h.jinja" if certified else "aligned_read.h.jinja"
    return render(template, formulas=f"{print_cpp(options)}\n{formulas}", **shared)


def _lower(
    query: ir.TensorBox,
    key: ir.TensorBox,
    value: ir.TensorBox,
    planes: ir.TensorBox | None,
    mask: ir.TensorBox | None,
    sinks: ir.TensorBox | None,
    length: sympy.Expr,
    scale: float,
    softcap: float,
    tolerance: float,
    unit_roundoff: float,
    min_context: int,
    *,
    bounds: ir.TensorBox | None = None,
    counters: ir.TensorBox | None = None,
    site: int = 0,
) -> ir.TensorBox:
    static = V.graph.sizevars.guard_int
    batch, query_heads, query_rows, key_dim = query.get_size()
    value_dim = static(value.get_size()[3])
    constants = Constants(
        key_dim=static(key_dim),
        value_dim=value_dim,
        group=static(query_heads) // static(key.get_size()[1]),
        query_rows=static(query_rows),
        scale=scale,
        softcap=softcap,
        tolerance=tolerance,
        unit_roundoff=unit_roundoff,
        min_context=min_context,
        length=sympy.sympify(length),
        site=site,
    )
    inputs = {"query": realize(query, contiguous_last=False), "key": realize(key), "value": realize(value)}
    worthwhile = tolerance > 0 if bounds is None else tolerance * unit_roundoff >= worst_case.FINEST_BUDGET
    if planes is not None and worthwhile:
        inputs["planes"] = realize(planes, contiguous_last=False)
    for name, tensor in (("mask", mask), ("sinks", sinks)):
        if tensor is not None:
            inputs[name] = realize(tensor, contiguous_last=False)
    for name, tensor in (("bounds", bounds), ("counters", counters)):
        if tensor is not None:
            inputs[name] = realize(tensor, contiguous_last=False)
    size = [batch, query_heads, query_rows, sympy.Integer(value_dim)]
    strides = ir.FlexibleLayout.contiguous_strides(size)
    output = ir.FixedLayout(device_of(query), query.get_dtype(), size, strides)
    if generates_triton(device_of(query)):
        return _lower_to_triton(inputs, output, constants)
    return emit(ReadAttention(inputs, output, constants))


def _lowering(*extras: str) -> Callable[..., ir.TensorBox]:
    """The lowering of an overload whose schema ends with the tensors and the index named."""
    lower: Callable[..., ir.TensorBox] = _lower
    shared = _lower.__code__.co_argcount

    def lower_overload(*arguments: Any) -> ir.TensorBox:
        return lower(*arguments[:shared], **dict(zip(extras, arguments[shared:], strict=True)))

    return lower_overload


def _lower_to_triton(inputs: Mapping[str, ir.IRNode], output: ir.FixedLayout, constants: Constants) -> ir.TensorBox:
    from .triton.attention import Read, Settings  # triton need not be installed for CPUs

    if "bounds" in inputs:
        raise NotImplementedError(
            "certified_read_attention has generated C++ only; call it outside torch.compile on this device"
        )
    mask = inputs.get("mask")
    strides = _broadcast_strides(mask) if mask is not None else [sympy.Integer(0)] * 4
    settings = Settings(
        scale=constants.scale,
        softcap=constants.softcap,
        tolerance=constants.tolerance,
        unit_roundoff=constants.unit_roundoff,
        min_context=constants.min_context,
        length=constants.length,
    )
    attention = {name: node for name, node in inputs.items() if name != "counters"}
    read = Read(attention, strides, mask_minimum(mask), settings)
    result = read.read(output)
    if "counters" in inputs:
        read.count(inputs["counters"], constants.site)
    return result


def register() -> None:
    """Register the lowerings."""
    for overload, extras in (
        (ops.aligned_read_attention.default, ()),
        (ops.aligned_read_attention.counted, ("counters", "site")),
        (ops.certified_read_attention.default, ("bounds", "site")),
        (ops.certified_read_attention.counted, ("bounds", "counters", "site")),
    ):
        register_lowering(overload, type_promotion_kind=None)(_lowering(*extras))
