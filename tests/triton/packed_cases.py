"""Arenas that are the cache, written by the reference and read by generated Triton in the interpreter."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from cases import Case, keyed_caches
from triton_cases import to_row_order
from triton_interpreter import interpreted

from alignedkv_compile import ops
from alignedkv_compile.arena import ArenaViews, arena_views
from alignedkv_compile.layout import ArenaLayout
from alignedkv_compile.ops import COUNTER_FIELDS
from alignedkv_compile.storage import STORAGES


def layout_of(case: Case, storage: str) -> ArenaLayout:
    batch, heads, capacity, key_dim = case.key.shape
    return ArenaLayout(batch * heads, capacity, key_dim, case.value.shape[3], STORAGES[storage], case.key.element_size())


def stored(case: Case, storage: str) -> torch.Tensor:
    """The arena with all rows, as a CPU holds it, written by the reference."""
    planes = torch.zeros(layout_of(case, storage).total, dtype=torch.uint8)
    capacity = case.key.shape[2]
    ops.store_rows.default(planes, case.key, case.value, torch.arange(capacity), capacity, storage)
    return planes


def written(case: Case, storage: str, parts: Sequence[torch.Tensor]) -> tuple[ArenaViews, ArenaViews]:
    """Arenas of the reference and of interpreted Triton, after the rows of ``parts`` were written one part after another."""
    layout, capacity = layout_of(case, storage), case.key.shape[2]
    expected, found = (torch.zeros(layout.total, dtype=torch.uint8) for _ in range(2))
    for part in parts:
        new = (case.key[:, :, part], case.value[:, :, part], part, capacity, storage)
        ops.store_rows.default(expected, *new)
        with interpreted(), keyed_caches():
            torch.compile(lambda *arguments: ops.store_rows.default(*arguments), fullgraph=True)(found, *new)
    return arena_views(to_row_order(expected, layout), layout), arena_views(found, layout)


@functools.cache
def _compiled() -> Callable[..., torch.Tensor]:
    def call(query: torch.Tensor, planes: torch.Tensor, room: torch.Tensor, rest: tuple[object, ...]) -> torch.Tensor:
        mask, sinks, heads, value_dim, dtype, storage, *numbers = rest
        cache = (heads, value_dim, dtype, storage, room.shape[0])
        return ops.packed_read_attention.counted(query, planes, mask, sinks, *cache, *numbers, 0)

    return torch.compile(call, fullgraph=True)


def run(case: Case, planes: torch.Tensor, storage: str) -> tuple[torch.Tensor, dict[str, int]]:
    """Output and counters of the generated read over a CPU's arena; how many rows there are is symbolic."""
    heads, capacity = case.key.shape[1:3]
    counters = torch.zeros(1, len(COUNTER_FIELDS), dtype=torch.int64)
    room = torch.empty(capacity, 0)
    planes = to_row_order(planes, layout_of(case, storage))
    for tensor, dim in ((planes, 0), (room, 0), (case.mask, 3)):
        if tensor is not None and tensor.shape[dim] > 1:
            torch._dynamo.maybe_mark_dynamic(tensor, dim)
    cache = (heads, case.value.shape[3], case.key.dtype, storage)
    numbers = (case.live, case.factor, case.softcap, case.tolerance, case.roundoff, case.min_context)
    with keyed_caches():
        output = _compiled()(case.query, planes, room, (case.mask, case.sinks, *cache, *numbers, counters))
    return output, dict(zip(COUNTER_FIELDS, counters[0].tolist(), strict=True))


def read(case: Case, planes: torch.Tensor, storage: str) -> tuple[torch.Tensor, dict[str, int]]:
    """The same as Triton, interpreted."""
    with interpreted():
        return run(case, planes, storage)
