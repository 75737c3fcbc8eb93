"""Masks of attention over a window that lies somewhere inside a longer buffer."""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch.fx import Node

from ..editor import GraphEditor
from ..nodes import fake, same
from ..records import AttentionSite
from ..replace_attention import mask_of


@dataclass(frozen=True)
class WindowRows:
    """Rows ``[first, first + count)`` of a buffer.

    Attributes:
        first: node of int64 ``[1]``.
        count, capacity: rows of the window and of the buffer.
    """

    first: Node
    count: Node | int
    capacity: Node | int


def mask_over_window(site: AttentionSite, rows: WindowRows, editor: GraphEditor) -> Node:
    """A mask ``[b, h, q, capacity]`` that is the site's over the window and prohibits all other rows."""
    device = fake(rows.first).device
    steps = editor.function(torch.arange, rows.count, device=device)
    positions = editor.function(operator.add, steps, rows.first)
    mask = mask_of(site, editor)
    if mask is None:
        empty = editor.function(torch.zeros, (1, 1, 1, rows.capacity), dtype=torch.bool, device=device)
        return editor.method("index_fill", empty, -1, positions, True)
    sizes = tuple(editor.size(mask, dim) for dim in range(3))
    if same(fake(mask).shape[3], 1):
        mask = editor.method("expand", mask, *sizes, rows.count)
    prohibited = False if fake(mask).dtype == torch.bool else -torch.inf
    empty = editor.function(torch.full, (*sizes, rows.capacity), prohibited, dtype=fake(mask).dtype, device=device)
    return editor.method("index_copy", empty, -1, positions, mask)
