"""``aligned_read_attention``, ``packed_read_attention`` and the certified read of either cache as C++ kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch

from .. import layout, ops, worst_case
from ..inductor_private import DTYPE_TO_CPP, V, ir, register_lowering
from ..layout import ArenaLayout
from ..storage import STORAGES
from ..torch_private import generates_triton
from .arena_text import arena_header, packed_rows
from .constants import SHARED, option_constants, print_cpp
from .cpp_kernel import PARTS, Kernel, Template, device_of, emit, realize, render
from .formulas import certified_formulas, policy_formulas
from .isa import streams_by_tiles
from .vectors import vector_header

MAX_THREADS = 256
"""Threads that share one call; more would only wait for each other."""


@dataclass(frozen=True)
class Constants:
    """What is fixed when the kernel is generated, and the cache's sizes.

    Attributes:
        arena: the layout of planes for this cache; its heads and rows do not matter.
        sizes: batch, KV heads and rows of the cache.
        dtype: of its numbers.
        aligned: whether fewer bits than all may be read.
    """

    arena: ArenaLayout
    sizes: tuple[sympy.Expr, sympy.Expr, sympy.Expr]
    dtype: torch.dtype
    aligned: bool
    group: int
    query_rows: int
    scale: float
    softcap: float
    tolerance: float
    unit_roundoff: float
    min_context: int
    break_even: float
    length: sympy.Expr
    site: int


class ReadAttention(Template):
    """The kernel for one set of head dimensions, group size, query rows, dtypes, mask kind and options; with an input
    ``bounds`` it is the certified read, without ``key`` and ``value`` that of an arena which is the cache."""

    def __init__(self, inputs: Mapping[str, ir.IRNode], layout: ir.Layout, constants: Constants) -> None:
        mutated = [name for name in ("bounds", "counters") if name in inputs]
        certified, packed = "bounds" in inputs, constants.arena.storage.packed
        name = f"{'certified_' if certified else '' if packed else 'aligned_'}{'packed_' if packed else ''}read_attention"
        super().__init__(name, inputs, mutated, layout)
        self.constants = constants

    def source(self, kernel: Kernel, nodes: Mapping[str, ir.Buffer], output: ir.Buffer) -> str:
        constants = self.constants
        arena, tensors = constants.arena, [nodes[name] for name in ("key", "value") if name in nodes]
        query, mask = nodes["query"], nodes.get("mask")
        mask_strides = _broadcast_strides(mask) if mask is not None else [sympy.Integer(0)] * 4
        sizes = [*constants.sizes, constants.length, *query.get_stride()]
        sizes += [*(stride for tensor in tensors for stride in tensor.get_stride()[:3]), *mask_strides]
        sinks = nodes.get("sinks")
        if sinks is not None:
            sizes.append(sinks.get_stride()[0])
        definition, aliases = self.definition(kernel, nodes, output, sizes)
        if "counters" in nodes:
            kernel.add_integer(constants.site, "site")
        certified = "bounds" in nodes
        text = kernel.size_expression
        mask_type = kernel.dtype(mask) if mask is not None else None
        shared = {
            "layout": layout,
            "max_threads": MAX_THREADS,
            "mask_type": mask_type,
            "sinks_type": kernel.dtype(sinks) if sinks is not None else None,
            "softcap": f"{constants.softcap:.9e}f" if constants.softcap > 0 else None,
            "storage": arena.storage,
            "tiled": _tiled(constants, query.get_dtype()),
            "break_even": constants.break_even,
        }
        common = render(
            "attention_common.h.jinja",
            query_type=kernel.dtype(query),
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
            parts=PARTS,
            constants=print_cpp(SHARED),
            vectors=vector_header(),
            arena=arena_header(arena),
            element=DTYPE_TO_CPP[constants.dtype],
            rows=packed_rows(arena, constants.dtype),
            stored_row=arena.stored_row,
            common=common,
            stream=render("stream.h.jinja", **shared),
            read_planes=_read_planes(constants, shared, certified=certified) if constants.aligned else "",
            definition=definition,
            aliases=aliases,
            has_planes=constants.aligned,
            has_counters="counters" in nodes,
            certified=certified,
            bounds_width=text(nodes["bounds"].get_size()[2]) if certified else "",
            bounds_offset=text(constants.site * 2 * nodes["bounds"].get_size()[2]) if certified else "",
            counter_fields=len(ops.COUNTER_FIELDS),
            batch=text(constants.sizes[0]),
            heads=text(constants.sizes[1]),
            capacity=text(constants.sizes[2]),
            length=text(constants.length),
            query_strides=[text(s) for s in query.get_stride()],
            **{
                f"{name}_strides": [text(s) for s in nodes[name].get_stride()[:3]] for name in ("key", "value") if name in nodes
            },
            mask_strides=[text(s) for s in mask_strides],
            sinks_stride=text(sinks.get_stride()[0]) if sinks is not None else "",
            **shared,
        )


def _tiled(constants: Constants, query_dtype: torch.dtype) -> bool:
    """Whether the stream is by matrix tiles; rows that are decoded are not."""
    arena, rows = constants.arena, constants.group * constants.query_rows
    plain = query_dtype == constants.dtype and not arena.storage.packed
    return plain and streams_by_tiles(query_dtype, rows, arena.key_dim, arena.value_dim)


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


def _read_planes(constants: Constants, shared: Mapping[str, object], *, certified: bool) -> str:
    """The read of one head's planes."""
    options = option_constants(constants.tolerance, constants.unit_roundoff, constants.min_context)
    formulas = (
        certified_formulas(constants.arena.key_dim, constants.arena.value_dim)
        if certified
        else policy_formulas(constants.arena.key_dim, constants.arena.value_dim, constants.dtype.itemsize)
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
    break_even: float = 0.0,
    bounds: ir.TensorBox | None = None,
    counters: ir.TensorBox | None = None,
    site: int = 0,
) -> ir.TensorBox:
    static = V.graph.sizevars.guard_int
    dtype = key.get_dtype()
    aligned = planes is not None and _worthwhile(tolerance, unit_roundoff, certified=bounds is not None)
    constants = Constants(
        arena=ArenaLayout(1, 1, static(key.get_size()[3]), static(value.get_size()[3]), element_size=dtype.itemsize),
        sizes=tuple(key.get_size()[:3]),
        dtype=dtype,
        aligned=aligned,
        group=static(query.get_size()[1]) // static(key.get_size()[1]),
        query_rows=static(query.get_size()[2]),
        scale=scale,
        softcap=softcap,
        tolerance=tolerance,
        unit_roundoff=unit_roundoff,
        min_context=min_context,
        break_even=break_even,
        length=sympy.sympify(length),
        site=site,
    )
    inputs = {"query": realize(query, contiguous_last=False), "key": realize(key), "value": realize(value)}
    inputs |= _realized(planes=planes if aligned else None, mask=mask, sinks=sinks, bounds=bounds, counters=counters)
    output = _output(query, constants)
    if generates_triton(device_of(query)):
        return _lower_to_triton(inputs, output, constants)
    return emit(ReadAttention(inputs, output, constants))


def _lower_packed(
    query: ir.TensorBox,
    planes: ir.TensorBox,
    mask: ir.TensorBox | None,
    sinks: ir.TensorBox | None,
    heads: int,
    value_dim: int,
    dtype: torch.dtype,
    storage: str,
    capacity: sympy.Expr,
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
    constants = Constants(
        arena=ArenaLayout(1, 1, static(key_dim), value_dim, STORAGES[storage], dtype.itemsize),
        sizes=(batch, sympy.Integer(heads), sympy.sympify(capacity)),
        dtype=dtype,
        aligned=_worthwhile(tolerance, unit_roundoff, certified=bounds is not None),
        group=static(query_heads) // heads,
        query_rows=static(query_rows),
        scale=scale,
        softcap=softcap,
        tolerance=tolerance,
        unit_roundoff=unit_roundoff,
        min_context=min_context,
        break_even=0.0,
        length=sympy.sympify(length),
        site=site,
    )
    inputs = {"query": realize(query, contiguous_last=False)}
    inputs |= _realized(planes=planes, mask=mask, sinks=sinks, bounds=bounds, counters=counters)
    if generates_triton(device_of(query)):
        return _lower_to_triton(inputs, _output(query, constants), constants)
    return emit(ReadAttention(inputs, _output(query, constants), constants))


def _worthwhile(tolerance: float, unit_roundoff: float, *, certified: bool) -> bool:
    """Whether such a tolerance leaves bits to be left out."""
    return tolerance * unit_roundoff >= worst_case.FINEST_BUDGET if certified else tolerance > 0


def _realized(**tensors: ir.TensorBox | None) -> dict[str, ir.IRNode]:
    """Those tensors that there are, in memory."""
    return {name: realize(tensor, contiguous_last=False) for name, tensor in tensors.items() if tensor is not None}


def _output(query: ir.TensorBox, constants: Constants) -> ir.FixedLayout:
    size = [*query.get_size()[:3], sympy.Integer(constants.arena.value_dim)]
    return ir.FixedLayout(device_of(query), query.get_dtype(), size, ir.FlexibleLayout.contiguous_strides(size))


def _lowering(lower: Callable[..., ir.TensorBox], *extras: str) -> Callable[..., ir.TensorBox]:
    """The lowering of an overload whose schema ends with the tensors and the index named."""
    shared = lower.__code__.co_argcount

    def lower_overload(*arguments: Any, **options: Any) -> ir.TensorBox:
        return lower(*arguments[:shared], **dict(zip(extras, arguments[shared:], strict=True)), **options)

    return lower_overload


def _lower_to_triton(inputs: Mapping[str, ir.IRNode], output: ir.FixedLayout, constants: Constants) -> ir.TensorBox:
    from .triton.attention import Read  # triton need not be installed for CPUs

    certified = "bounds" in inputs
    if certified or not constants.arena.storage.has_triton(constants.dtype, output.get_device()):
        what = "certified_read_attention" if certified else f"packed_read_attention of lossless rows of {constants.dtype}"
        raise NotImplementedError(f"{what} has generated C++ only; call it outside torch.compile on this device")
    mask = inputs.get("mask")
    strides = _broadcast_strides(mask) if mask is not None else [sympy.Integer(0)] * 4
    attention = {name: node for name, node in inputs.items() if name != "counters"}
    read = Read(attention, strides, mask_minimum(mask), constants)
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
        register_lowering(overload, type_promotion_kind=None)(_lowering(_lower, *extras))
    for overload, extras in (
        (ops.packed_read_attention.default, ()),
        (ops.packed_read_attention.counted, ("counters", "site")),
        (ops.certified_packed_read_attention.default, ("bounds", "site")),
        (ops.certified_packed_read_attention.counted, ("bounds", "counters", "site")),
    ):
        register_lowering(overload, type_promotion_kind=None)(_lowering(_lower_packed, *extras))
