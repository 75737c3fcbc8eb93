"""Arenas made of other arenas: more or fewer rows, other batch entries."""

from __future__ import annotations

from dataclasses import replace

import torch

from .arena import arena_views
from .arena_memory import zeroed_arena
from .layout import SCORE_GROUP, ArenaLayout


def resized(planes: torch.Tensor, layout: ArenaLayout, capacity: int) -> torch.Tensor:
    """The arena of ``layout`` with room for ``capacity`` rows: what both have room for is taken over, the rest is zero."""
    target = replace(layout, capacity=capacity)
    return _copied(planes, layout, target, None)


def selected(planes: torch.Tensor, layout: ArenaLayout, entries: torch.Tensor, heads: int) -> torch.Tensor:
    """The arena of some batch ``entries`` (int64 ``[B']``) of another one, in this order; ``heads`` per entry."""
    chosen = (entries.to(planes.device)[:, None] * heads + torch.arange(heads, device=planes.device)).flatten()
    target = replace(layout, heads=int(chosen.shape[0]))
    return _copied(planes, layout, target, chosen)


def _copied(planes: torch.Tensor, layout: ArenaLayout, target: ArenaLayout, chosen: torch.Tensor | None) -> torch.Tensor:
    result = zeroed_arena(target.total, planes.device)
    source, views = arena_views(planes, layout), arena_views(result, target)
    views.header.copy_(source.header)
    rows, blocks = min(layout.rows, target.rows), min(layout.blocks, target.blocks)
    sections = [
        (source.scales, views.scales, rows),
        (source.value_count, views.value_count, blocks),
        (source.value_sum, views.value_sum, blocks),
        (source.key_hi, views.key_hi, rows // SCORE_GROUP),
        (source.value_hi, views.value_hi, rows),
        (source.key_mid, views.key_mid, min(layout.mid_rows, target.mid_rows)),
        (source.value_mid, views.value_mid, min(layout.mid_rows, target.mid_rows)),
        (source.residual, views.residual, rows),
    ]
    for old, new, count in sections:
        part = old[:, :count]
        new[:, :count] = part if chosen is None else part.index_select(0, chosen)
    return result
