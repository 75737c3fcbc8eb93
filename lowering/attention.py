"""``aligned_read_attention`` and ``certified_read_attention`` as C++ kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch

from .. import layout, ops, precision, worst_case
from ..inductor_private import V, ir, register_lowering
from ..torch_private import generates_triton
from .arena_text import arena_header
from .cpp_kernel import Kernel, Template, device_of, emit, realize, render
from .isa import chosen_isa

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
        isa = chosen_isa()
        has_planes = "planes" in nodes
        mask_type = kernel.dtype(mask) if mask is not None else None
        shared = {
            "layout": layout,
            "isa": isa,
            "max_threads": MAX_THREADS,
            "mask_type": mask_type,
            "sinks_type": kernel.dtype(sinks) if sinks is not None else None,
            "softcap": constants.softcap if constants.softcap > 0 else None,
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
            simd=render("simd.h.jinja", **shared),
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
    """At or below half of the dtype's minimum a floating mask prohibits."""
    if mask is None or mask.get_dtype() == torch.bool:
        return 0.0
    return torch.finfo(mask.get_dtype()).min / 2


def _read_planes(constants: Constants, shared: Mapping[str, object], element_size: int, *, certified: bool) -> str:
    """The read of one head's planes."""
    if not certified:
        return render(
            "aligned_read.h.jinja",
            formulas=_formulas(constants, element_size),
            query_terms=precision.QUERY_TERMS,
            term_ratio=precision.TERM_RATIO,
            **shared,
        )
    return render(
        "certified_read.h.jinja",
        formulas=_certified_formulas(constants),
        query_terms=precision.QUERY_TERMS,
        term_ratio=precision.TERM_RATIO,
        refinements=worst_case.REFINEMENTS,
        ladder=worst_case.LADDER,
        value_tile=worst_case.VALUE_TILE,
        **shared,
    )


def _option_constants(constants: Constants) -> list[str]:
    """The call's options, and the limits of both reads, as C++."""
    return [
        f"constexpr float ALPHA = {constants.tolerance:.9e}f, ROUNDOFF = {constants.unit_roundoff:.9e}f;",
        f"constexpr float LARGEST_SHIFT = {float(precision.LARGEST_SHIFT)}f;",
        f"constexpr float STREAM_FRACTION = {float(precision.STREAM_FRACTION):.9e}f;",
        f"constexpr float MIN_NORM = {precision.NORM_RANGE[0]:.9e}f, MAX_NORM = {precision.NORM_RANGE[1]:.9e}f;",
        f"constexpr int64_t MIN_CONTEXT = {constants.min_context};",
    ]


def _certified_formulas(constants: Constants) -> str:
    """The certificate as C++ functions and constants."""

    def scalar(function: str, name: str, *arguments: str, **values: float) -> str:
        return precision.print_cpp_function(function, name, arguments, values, worst_case.WORST_CASE)

    def vector(name: str, *arguments: str) -> str:
        return precision.print_cpp_vector_function(name, name, arguments, worst_case.WORST_CASE)

    value_bound = worst_case.value_bound.subs({worst_case.s_V: 1, worst_case.D: constants.value_dim})
    numbers = {
        "VALUE_BOUND_4": value_bound.subs(worst_case.b, 4),
        "VALUE_BOUND_8": value_bound.subs(worst_case.b, 8),
        "QUERY_SLACK": worst_case.query_slack(constants.key_dim),
        "SUM_SLACK": worst_case.SUM_SLACK,
        "FLOAT_SLACK": worst_case.FLOAT_SLACK,
        "SMALLEST_SCALE": worst_case.SMALLEST_SCALE,
        "LARGEST_SCORE_BOUND": worst_case.LARGEST_SCORE_BOUND,
        **{f"{name.upper()}_SHARE": share for name, share in worst_case.SHARES.items()},
    }
    return "\n".join(
        [
            scalar("score_bound_4", "score_bound", "l_1", "q_1", "r_1", "s_K", b=4, D_K=constants.key_dim),
            scalar("score_bound_8", "score_bound", "l_1", "q_1", "r_1", "s_K", b=8, D_K=constants.key_dim),
            scalar("worst_case_budget", "worst_case_budget", "R", "alpha", "u"),
            scalar("certificate", "certificate", "A", "R", "V", "W", "W_v"),
            vector("skipped_value_bound", "m", "v"),
            vector("growth", "d"),
            vector("key_addend", "R", "g", "p", "v"),
            vector("weight_error_bound", "g", "p"),
            vector("weight_least", "d", "p"),
            vector("weight_slack", "x"),
            *(f"constexpr float {name} = {float(number):.9e}f;" for name, number in numbers.items()),
            *_option_constants(constants),
        ]
    )


def _formulas(constants: Constants, element_size: int) -> str:
    """The error model as C++ functions and constants."""
    value_coefficient = {bits: precision.evaluate("value_coefficient", b=bits, D=constants.value_dim) for bits in (4, 8)}
    arena = layout.ArenaLayout(1, 1, constants.key_dim, constants.value_dim)
    middle_key, middle_value = precision.middle_ratios(arena, element_size)
    functions = [
        precision.print_cpp_function("error_budget", "budget", ("alpha", "R", "u")),
        precision.print_cpp_function("skip_threshold", "skip_threshold", ("B", "N", "P_v", "n", "theta_4")),
        precision.print_cpp_function(
            "addend_sum", "addend_sum", ("P_sK", "P_sKv", "P_sV", "R", "q"), {"D": constants.value_dim}
        ),
        precision.print_cpp_function("threshold", "threshold", ("B", "E", "N")),
        precision.print_cpp_function("remaining_budget", "remaining_budget", ("B", "left")),
        precision.print_cpp_vector_function("weight_error_factor", "weight_error_factor", ("x",)),
        precision.print_cpp_function("key_coefficient_4", "key_coefficient", ("q",), {"b": 4}),
        precision.print_cpp_function("key_coefficient_8", "key_coefficient", ("q",), {"b": 8}),
        precision.print_cpp_function(
            "predicted_bytes",
            "predicted_bytes",
            ("plane_K", "plane_V", "row_K", "row_V", "rows_K", "rows_K8", "rows_V", "rows_V4", "rows_V8"),
        ),
        f"constexpr float VALUE_COEFFICIENT_4 = {value_coefficient[4]:.9e}f;",
        f"constexpr float VALUE_COEFFICIENT_8 = {value_coefficient[8]:.9e}f;",
        f"constexpr float KEY_MIDDLE_RATIO = {middle_key:.9e}f, VALUE_MIDDLE_RATIO = {middle_value:.9e}f;",
        *_option_constants(constants),
    ]
    return "\n".join(functions)


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
