"""Rewriting attention over preallocated caches: planes beside the cache, which stays as it is.

  key_cache.index_copy_(2, positions, new_key)
  value_cache.index_copy_(2, positions, new_value)
+ alignedkv.quantize_on_write(planes, new_key, new_value, positions, capacity)
- scaled_dot_product_attention(query, repeat_kv(key_cache), repeat_kv(value_cache), mask, scale=scale)
+ alignedkv.aligned_read_attention(query, key_cache, value_cache, planes, mask, length=capacity, scale=scale, ...)

With certified reads it is ``certified_read_attention``, with its ``bounds``.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from alignedkv_compile.layout import ArenaLayout
from alignedkv_compile.ops import quantize_on_write

from .editor import GraphEditor
from .nodes import constant, fake
from .records import Outcome, StaticPair
from .replace_attention import AlignmentOptions, StatisticsInputs, replace_attention


def rewrite_static(
    pair: StaticPair, number: int, editor: GraphEditor, options: AlignmentOptions, statistics: StatisticsInputs
) -> Node | None:
    """Rewrite one pair of caches; returns the placeholder of its plane arena, or None at tolerance 0.

    Args:
        number: of the pair in its graph, for the placeholder's name.
    """
    planes = _planes(pair, number, editor) if options.tolerance > 0 else None
    order = {node: position for position, node in enumerate(editor.graph.nodes)}
    for write in pair.writes if planes is not None else ():
        later = max(write.key, write.value, key=order.__getitem__)
        with editor.before(later.next, later):
            rows = (editor.current(node) for node in (write.new_key, write.new_value, write.positions))
            editor.function(quantize_on_write.default, planes, *rows, _capacity(pair, editor))
    for site in pair.sites:
        if site.outcome is Outcome.REWRITTEN:
            with editor.before(site.attention, site.attention):
                length = _capacity(pair, editor)
            replace_attention(
                site, editor, options, key=pair.key, value=pair.value, planes=planes, length=length, statistics=statistics
            )
    return planes


def _planes(pair: StaticPair, number: int, editor: GraphEditor) -> Node:
    key, value = fake(pair.key), fake(pair.value)
    heads = key.shape[0] * constant(key.shape[1])
    size = ArenaLayout(heads, key.shape[2], constant(key.shape[3]), constant(value.shape[3])).total
    return editor.placeholder(f"alignedkv_planes_{number}", (size,), torch.uint8, key.device)


def _capacity(pair: StaticPair, editor: GraphEditor) -> Node | int:
    rows = fake(pair.key).shape[2]
    return rows if isinstance(rows, int) else editor.method("size", pair.key, 2)
