"""Placeholders for planes beside cache tensors that are graph inputs."""

from __future__ import annotations

import torch
from torch.fx import Node

from alignedkv_compile.layout import ArenaLayout

from ..editor import GraphEditor
from ..nodes import constant, fake


def planes_placeholder(key: Node, value: Node, number: int, editor: GraphEditor) -> Node:
    """A graph input for the planes of ``key [B, H, C, Dk]`` and ``value [B, H, C, Dv]``: uint8 ``[N]``.

    Args:
        number: of the pair in its graph, for the name.
    """
    cache, values = fake(key), fake(value)
    heads = cache.shape[0] * constant(cache.shape[1])
    size = ArenaLayout(heads, cache.shape[2], constant(cache.shape[3]), constant(values.shape[3])).total
    return editor.placeholder(f"alignedkv_planes_{number}", (size,), torch.uint8, cache.device)
