"""The meaning of the operators, in eager torch: readable first, and what runs outside Inductor.

The generated kernels make the same decisions from the same formulas (:mod:`alignedkv_compile.precision`); they differ from this
file only in the order of floating-point sums, so a row that sits on a threshold may fall on either side of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import library

from . import ops
from .arena import ArenaViews, arena_views
from .layout import PLANES_VALID, arena_layout
from .reference_head import ReadCounts, head_calls, read_full
from .reference_read import read_aligned
from .reference_worst_case import read_certified
from .reference_write import cache_rows


@library.impl(f"{ops.NAMESPACE}::aligned_read_attention", "CompositeExplicitAutograd")
def aligned_read_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    planes: torch.Tensor | None,
    mask: torch.Tensor | None,
    sinks: torch.Tensor | None,
    length: int,
    scale: float,
    softcap: float,
    tolerance: float,
    unit_roundoff: float,
    min_context: int,
    *,
    break_even: float = 0.0,
) -> torch.Tensor:
    """See :data:`alignedkv_compile.ops.aligned_read_attention`."""
    call = (query, key, value, planes, mask, sinks, length, scale, softcap, tolerance, unit_roundoff, min_context)
    return _attention(*call, counts=ReadCounts())


@library.impl(f"{ops.NAMESPACE}::aligned_read_attention.counted", "CompositeExplicitAutograd")
def aligned_read_attention_counted(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    planes: torch.Tensor | None,
    mask: torch.Tensor | None,
    sinks: torch.Tensor | None,
    length: int,
    scale: float,
    softcap: float,
    tolerance: float,
    unit_roundoff: float,
    min_context: int,
    counters: torch.Tensor,
    site: int,
    *,
    break_even: float = 0.0,
) -> torch.Tensor:
    """The same, adding what was read to row ``site`` of ``counters``."""
    counts = ReadCounts()
    call = (query, key, value, planes, mask, sinks, length, scale, softcap, tolerance, unit_roundoff, min_context)
    output = _attention(*call, counts=counts)
    counts.add_to(counters, site)
    return output


@library.impl(f"{ops.NAMESPACE}::packed_read_attention", "CompositeExplicitAutograd")
def packed_read_attention(*arguments: Any) -> torch.Tensor:
    """See :data:`alignedkv_compile.ops.packed_read_attention`."""
    return _packed_attention(*arguments, counts=ReadCounts())


@library.impl(f"{ops.NAMESPACE}::packed_read_attention.counted", "CompositeExplicitAutograd")
def packed_read_attention_counted(*arguments: Any) -> torch.Tensor:
    """The same, adding what was read to row ``site`` of ``counters``."""
    *call, counters, site = arguments
    counts = ReadCounts()
    output = _packed_attention(*call, counts=counts)
    counts.add_to(counters, site)
    return output


@library.impl(f"{ops.NAMESPACE}::certified_packed_read_attention", "CompositeExplicitAutograd")
def certified_packed_read_attention(*arguments: Any) -> torch.Tensor:
    """See :data:`alignedkv_compile.ops.certified_packed_read_attention`."""
    *call, bounds, site = arguments
    return _certified(_packed_attention, call, bounds[site], ReadCounts())


@library.impl(f"{ops.NAMESPACE}::certified_packed_read_attention.counted", "CompositeExplicitAutograd")
def certified_packed_read_attention_counted(*arguments: Any) -> torch.Tensor:
    """The same, adding what was read to row ``site`` of ``counters``."""
    *call, bounds, counters, site = arguments
    counts = ReadCounts()
    output = _certified(_packed_attention, call, bounds[site], counts)
    counts.add_to(counters, site)
    return output


def _packed_attention(
    query: torch.Tensor,
    planes: torch.Tensor,
    mask: torch.Tensor | None,
    sinks: torch.Tensor | None,
    heads: int,
    value_dim: int,
    dtype: torch.dtype,
    storage: str,
    capacity: int,
    length: int,
    *numbers: Any,
    counts: ReadCounts,
    certificates: torch.Tensor | None = None,
) -> torch.Tensor:
    """The read of an arena that is the cache: what the others read from cache tensors is decoded first."""
    batch, key_dim = query.shape[0], query.shape[3]
    views, layout, keys, values = cache_rows(planes, batch, heads, key_dim, value_dim, dtype, storage, capacity, length)
    call = (query, keys, values, views, mask, sinks, length, *numbers)
    return _read_heads(*call, stored_row=layout.stored_row, counts=counts, certificates=certificates)


@library.impl(f"{ops.NAMESPACE}::certified_read_attention", "CompositeExplicitAutograd")
def certified_read_attention(*arguments: Any) -> torch.Tensor:
    """See :data:`alignedkv_compile.ops.certified_read_attention`."""
    *call, bounds, site = arguments
    return _certified(_attention, call, bounds[site], ReadCounts())


@library.impl(f"{ops.NAMESPACE}::certified_read_attention.counted", "CompositeExplicitAutograd")
def certified_read_attention_counted(*arguments: Any) -> torch.Tensor:
    """The same, adding what was read to row ``site`` of ``counters``."""
    *call, bounds, counters, site = arguments
    counts = ReadCounts()
    output = _certified(_attention, call, bounds[site], counts)
    counts.add_to(counters, site)
    return output


def _certified(
    attention: Callable[..., torch.Tensor], call: Sequence[Any], bounds: torch.Tensor, counts: ReadCounts
) -> torch.Tensor:
    """Certified reads by ``attention``, whose certificates go to one site's ``bounds`` (float32 ``[2, W]``): this call's, and
    the largest."""
    query_heads = call[0].shape[1]
    certificates = bounds.new_zeros(query_heads)
    output = attention(*call, counts=counts, certificates=certificates)
    last, worst = bounds[:, :query_heads]
    last.copy_(certificates)
    torch.maximum(worst, certificates, out=worst)
    return output


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    planes: torch.Tensor | None,
    mask: torch.Tensor | None,
    sinks: torch.Tensor | None,
    length: int,
    scale: float,
    softcap: float,
    tolerance: float,
    unit_roundoff: float,
    min_context: int,
    *,
    counts: ReadCounts,
    certificates: torch.Tensor | None = None,
) -> torch.Tensor:
    """The read of cache tensors, with planes beside them or not. With ``certificates``, float32 zeros ``[Hq]`` that are raised
    to this call's, each read is certified."""
    valid = planes is not None and int(planes.narrow(0, 0, 8).view(torch.int64)) == PLANES_VALID
    views = arena_views(planes, arena_layout(key, value)) if planes is not None and valid else None
    numbers = (scale, softcap, tolerance, unit_roundoff, min_context)
    return _read_heads(query, key, value, views, mask, sinks, length, *numbers, counts=counts, certificates=certificates)


def _read_heads(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    views: ArenaViews | None,
    mask: torch.Tensor | None,
    sinks: torch.Tensor | None,
    length: int,
    scale: float,
    softcap: float,
    tolerance: float,
    unit_roundoff: float,
    min_context: int,
    *,
    stored_row: int | None = None,
    counts: ReadCounts,
    certificates: torch.Tensor | None = None,
) -> torch.Tensor:
    """Every attention operator, head by head; ``views`` is None where there are no planes to believe."""
    batch, query_heads, query_rows, _ = query.shape
    group, value_dim = query_heads // key.shape[1], value.shape[-1]
    output = query.new_empty(batch, query_heads, query_rows, value_dim)
    for index, b, selected, call in head_calls(
        query, key, value, mask, sinks, length, scale, softcap, tolerance, unit_roundoff, stored_row
    ):
        result = None
        worthwhile = views is not None and tolerance > 0 and call.span >= max(min_context, 1)
        if views is not None and worthwhile and torch.isfinite(call.query).all():
            if certificates is None:
                result = read_aligned(call, views, index, counts)
            else:
                certified = read_certified(call, views, index, counts)
                result = None if certified is None else certified.output
                if certified is not None:
                    size = certified.output.norm(dim=-1) * unit_roundoff
                    relative = torch.where(size > 0, certified.bound / size, 0.0).view(group, query_rows).amax(1)
                    certificates[selected] = torch.maximum(certificates[selected], relative.to(certificates.dtype))
        if result is None:
            result = read_full(call, counts, torch.float32 if certificates is None else torch.float64)
        output[b, selected] = result.view(group, query_rows, value_dim).to(output.dtype)
    return output
