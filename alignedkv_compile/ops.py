"""Schemas and fakes of the operators that the passes write and the lowerings implement.

Passes and lowerings meet at these names and never import each other. The meaning of the
operators is :mod:`alignedkv_compile.reference`, which also runs whenever an operator is called outside Inductor.
"""

from __future__ import annotations

import torch
from torch import library

from .layout import ArenaLayout
from .storage import STORAGES

NAMESPACE = "alignedkv"

COUNTER_FIELDS = (
    "calls",
    "bytes_read",
    "bytes_full",
    "rows",
    "key_rows_mid",
    "key_rows_full",
    "value_rows_hi",
    "value_rows_mid",
    "value_rows_full",
)
"""Columns of the int64 ``counters [sites, len(COUNTER_FIELDS)]`` tensor. ``rows`` are live cache rows per KV head, summed
over batch and heads; the others count rows that were read beyond the 4-bit K plane. ``bytes_full`` is what a kernel
that streams the cache in its own dtype would read."""


def mask_floor(dtype: torch.dtype) -> float:
    """A floating mask of ``dtype`` prohibits at or below this, half of the smallest number, rather than being a bias."""
    return torch.finfo(dtype).min / 2


def is_ours(target: object) -> bool:
    """Whether what a node of a graph calls is an operator of this file."""
    return getattr(target, "namespace", None) == NAMESPACE


_library = library.Library(NAMESPACE, "DEF")

_library.define("quantize_on_write(Tensor(a!) planes, Tensor key, Tensor value, Tensor positions, SymInt capacity) -> ()")
_library.define("store_rows(Tensor(a!) planes, Tensor key, Tensor value, Tensor positions, SymInt capacity, str storage) -> ()")
_library.define(
    "load_rows(Tensor planes, Tensor key, Tensor value, Tensor positions, SymInt rows, SymInt capacity, str storage)"
    " -> (Tensor, Tensor)"
)
_library.define(
    "resized_planes(Tensor planes, SymInt heads, SymInt capacity, int key_dim, int value_dim, str storage, int element_size, "
    "SymInt rows) -> Tensor"
)
_ATTENTION_ARGUMENTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? planes, Tensor? mask, Tensor? sinks, SymInt length, "
    "float scale, float softcap, float tolerance, float unit_roundoff, int min_context"
)
_BREAK_EVEN = "*, float break_even=0.0"
_library.define(f"aligned_read_attention({_ATTENTION_ARGUMENTS}, {_BREAK_EVEN}) -> Tensor")
_library.define(
    f"aligned_read_attention.counted({_ATTENTION_ARGUMENTS}, Tensor(a!) counters, int site, {_BREAK_EVEN}) -> Tensor"
)  # an overload, so that the uncounted operator is functional

_library.define(f"certified_read_attention({_ATTENTION_ARGUMENTS}, Tensor(a!) bounds, int site) -> Tensor")
_library.define(
    f"certified_read_attention.counted({_ATTENTION_ARGUMENTS}, Tensor(a!) bounds, Tensor(b!) counters, int site) -> Tensor"
)

_PACKED_ARGUMENTS = (
    "Tensor query, Tensor planes, Tensor? mask, Tensor? sinks, int heads, int value_dim, ScalarType dtype, str storage, "
    "SymInt capacity, SymInt length, float scale, float softcap, float tolerance, float unit_roundoff, int min_context"
)
_library.define(f"packed_read_attention({_PACKED_ARGUMENTS}) -> Tensor")
_library.define(f"packed_read_attention.counted({_PACKED_ARGUMENTS}, Tensor(a!) counters, int site) -> Tensor")
_library.define(f"certified_packed_read_attention({_PACKED_ARGUMENTS}, Tensor(a!) bounds, int site) -> Tensor")
_library.define(
    f"certified_packed_read_attention.counted({_PACKED_ARGUMENTS}, Tensor(a!) bounds, Tensor(b!) counters, int site) -> Tensor"
)

quantize_on_write = torch.ops.alignedkv.quantize_on_write
"""Write the narrow planes of new cache rows, in place.

Args:
    planes: uint8 ``[N]``, a plane arena for ``capacity`` rows (see :mod:`alignedkv_compile.layout`); mutated.
    key: ``[B, H, S, Dk]`` in bf16, fp16 or fp32: the rows that the cache tensor holds at ``positions``.
    value: ``[B, H, S, Dv]``, same dtype.
    positions: int64 ``[S]``, row numbers in the cache; a number outside ``[0, capacity)`` is ignored here, since the cache
        write that this op accompanies raises for it.
    capacity: rows per (batch, head) of the cache tensors.
"""

aligned_read_attention = torch.ops.alignedkv.aligned_read_attention
"""Softmax attention of up to 16 query rows over a cache, each cached number read only as precisely as it deserves.

Args:
    query: ``[B, Hq, Q, Dk]``, ``Hq`` a multiple of the cache's ``H`` (grouped-query attention); any strides.
    key: ``[B, H, C, Dk]``, the authoritative cache *after* this step's write; last dimension contiguous.
    value: ``[B, H, C, Dv]``, likewise.
    planes: the pair's plane arena, or None: then, and when its header says stale, all bits are read from ``key`` and ``value``.
    mask: None, or broadcastable to ``[B, Hq, Q, C]``: bool (True attends) or floating (added to the scores). A row
        that no query row attends to is not read at all and changes nothing, whatever it holds.
    sinks: None, or floating ``[Hq]``: one more logit for each query head, which takes its part of the weights and has no row of
        V. It is not scaled, capped or masked. A query row that attends to nothing else gives zeros.
    length: rows ``[0, length)`` are live; ``length <= C``. The mask's last dimension may be ``length`` or ``C``.
    scale: multiplies ``query @ key^T``.
    softcap: with a number above 0 the scaled score ``s`` becomes ``softcap * tanh(s / softcap)``, before the mask is added.
    tolerance: added rms error allowed, in units of the output's rounding error; 0 reads all bits.
    unit_roundoff: ``u`` of the dtype in whose rounding error the tolerance is measured (2**-8 for bf16, 2**-11 for fp16,
        2**-24 for fp32).
    min_context: with a shorter span from the first to the last attended row all bits are read.
    counters: (overload ``counted``) int64 ``[sites, len(COUNTER_FIELDS)]``; row ``site`` is added to.
    site: (overload ``counted``) row of ``counters``.
    break_even: 0, or a share of the bytes of a KV head's attended rows: a head whose read takes more is read at all bits by the
        next call, and tried again after it; each time in a row for twice as long and a call more, 31 calls at most. Generated
        C++ keeps count of the calls in ``planes`` (:mod:`alignedkv_compile.layout`); everything else takes no notice.

Returns:
    ``[B, Hq, Q, Dv]`` contiguous, in the dtype of ``query``.
"""

store_rows = torch.ops.alignedkv.store_rows
"""Write rows into an arena that is the cache, in place.

Args:
    planes: uint8 ``[N]``, an arena of :class:`~alignedkv_compile.layout.ArenaLayout` with this ``storage``; mutated.
    key: ``[B, H, S, Dk]`` in bf16, fp16 or fp32: new rows.
    value: ``[B, H, S, Dv]``, same dtype.
    positions: int64 ``[S]``, row numbers in the cache.
    capacity: rows per (batch, head) of the arena.
    storage: one of :data:`alignedkv_compile.storage.PACKED`.

Raises:
    IndexError: a position outside of ``[0, capacity)``.
"""

load_rows = torch.ops.alignedkv.load_rows
"""K and V out of an arena that is the cache, with the rows just written as they are at hand.

Args:
    planes, key, value, positions, capacity, storage: as :data:`store_rows` took them.
    rows: how many to return, from the first on; ``rows <= capacity``.

Returns:
    ``[B, H, rows, Dk]`` and ``[B, H, rows, Dv]``, contiguous, in the dtype of ``key``: at ``positions`` the given ones,
    elsewhere what the arena holds, rounded to the dtype.
"""

resized_planes = torch.ops.alignedkv.resized_planes
"""A copy of an arena that is the cache, with room for another number of rows.

Args:
    planes: uint8 ``[N]``.
    heads: batch size times KV heads.
    capacity: rows per (batch, head) of ``planes``.
    key_dim, value_dim: head dimensions.
    storage: one of :data:`alignedkv_compile.storage.PACKED`.
    element_size: bytes of a number of the cache.
    rows: rows per (batch, head) of the result; further ones are zero, or left out.

Returns:
    uint8, an arena of its own.
"""

packed_read_attention = torch.ops.alignedkv.packed_read_attention
"""Softmax attention of up to 16 query rows over an arena that is the cache; no more precise than its ``storage`` holds rows.

Args:
    query: ``[B, Hq, Q, Dk]``, ``Hq`` a multiple of ``heads``; any strides.
    planes: uint8 ``[N]``, the arena after this step's :data:`store_rows`.
    heads: KV heads of the cache.
    value_dim: ``Dv``.
    dtype: of the cache's numbers.
    storage: one of :data:`alignedkv_compile.storage.PACKED`.
    capacity: rows per (batch, head) of the arena.
    mask, sinks, length, scale, softcap, tolerance, unit_roundoff, min_context, counters, site: as
        :data:`aligned_read_attention` takes them. What it reads from the cache is decoded from the arena here.

Returns:
    ``[B, Hq, Q, Dv]`` contiguous, in the dtype of ``query``.
"""

certified_read_attention = torch.ops.alignedkv.certified_read_attention
"""The same with a certificate: the error of every output row is at most ``tolerance * unit_roundoff`` times the row's norm,
whatever the cache holds (:mod:`alignedkv_compile.worst_case`).

Args:
    query, ..., min_context: as :data:`aligned_read_attention` takes them.
    bounds: float32 ``[sites, 2, W]``, ``W >= Hq``. ``bounds[site, 0, :Hq]`` becomes this call's certificates in units of
        ``unit_roundoff`` times the output row's norm, the largest over batch and query rows of each query head; 0 where all
        bits were read. ``bounds[site, 1, :Hq]`` becomes its maximum with them. Nothing else is written.
    counters: (overload ``counted``) as :data:`aligned_read_attention` takes them.
    site: index into the first dimension of ``bounds`` and ``counters``.

Returns:
    ``[B, Hq, Q, Dv]`` contiguous, in the dtype of ``query``; rounding to it is not part of the certificate.
"""

certified_packed_read_attention = torch.ops.alignedkv.certified_packed_read_attention
"""The certified read of an arena that is the cache and holds every bit.

Args:
    query, ..., min_context: as :data:`packed_read_attention` takes them; ``storage`` is ``"lossless"``.
    bounds, counters, site: as :data:`certified_read_attention` takes them.

Returns:
    As :data:`certified_read_attention`; the certificate is relative to attention over the numbers that were stored.
"""


@library.register_fake(f"{NAMESPACE}::quantize_on_write")
def _quantize_on_write_fake(
    planes: torch.Tensor, key: torch.Tensor, value: torch.Tensor, positions: torch.Tensor, capacity: int
) -> None:
    return None


@library.register_fake(f"{NAMESPACE}::aligned_read_attention")
def _aligned_read_attention_fake(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: object, **__: object
) -> torch.Tensor:
    batch, heads, rows, _dim = query.shape
    return query.new_empty(batch, heads, rows, value.shape[-1])


@library.register_fake(f"{NAMESPACE}::store_rows")
def _store_rows_fake(*_: object) -> None:
    return None


@library.register_fake(f"{NAMESPACE}::load_rows")
def _load_rows_fake(
    planes: torch.Tensor, key: torch.Tensor, value: torch.Tensor, positions: torch.Tensor, rows: int, *_: object
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, heads, _rows, key_dim = key.shape
    return key.new_empty(batch, heads, rows, key_dim), value.new_empty(batch, heads, rows, value.shape[-1])


@library.register_fake(f"{NAMESPACE}::resized_planes")
def _resized_planes_fake(
    planes: torch.Tensor,
    heads: int,
    capacity: int,
    key_dim: int,
    value_dim: int,
    storage: str,
    element_size: int,
    rows: int,
) -> torch.Tensor:
    layout = ArenaLayout(heads, rows, key_dim, value_dim, STORAGES[storage], element_size)
    return planes.new_empty(layout.total)


@library.register_fake(f"{NAMESPACE}::packed_read_attention")
def _packed_read_attention_fake(
    query: torch.Tensor,
    planes: torch.Tensor,
    mask: torch.Tensor | None,
    sinks: torch.Tensor | None,
    heads: int,
    value_dim: int,
    *_: object,
) -> torch.Tensor:
    batch, query_heads, rows, _dim = query.shape
    return query.new_empty(batch, query_heads, rows, value_dim)


for _name in (
    "packed_read_attention.counted",
    "certified_packed_read_attention",
    "certified_packed_read_attention.counted",
):
    library.register_fake(f"{NAMESPACE}::{_name}")(_packed_read_attention_fake)

for _name in ("aligned_read_attention.counted", "certified_read_attention", "certified_read_attention.counted"):
    library.register_fake(f"{NAMESPACE}::{_name}")(_aligned_read_attention_fake)
