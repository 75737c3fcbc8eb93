"""Rewriting attention over a concatenated cache: rows are appended to a growing buffer instead of copying the whole cache.

  - key = cat([past_key, new_key], -2)                       # past_key: a graph input; key: a graph output
  + positions = arange(new_rows) + past_length
  + key_buffer.index_copy_(2, positions, new_key)            # [B, H, capacity, D], capacity a symbol of its own
  + alignedkv.quantize_on_write(planes, new_key, new_value, positions, capacity)
  - scaled_dot_product_attention(query, key, value, mask)
  + alignedkv.aligned_read_attention(query, key_buffer, value_buffer, planes, mask, length=past_length + new_rows, ...)

The past leaves the inputs and the concatenation leaves the outputs: whoever calls the graph passes the buffers that hold the
past, and returns views of their live prefix.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import cast

import torch
from torch.fx import Node
from torch.fx.node import Argument

from alignedkv_compile.layout import BLOCK_ROWS, ArenaLayout
from alignedkv_compile.ops import quantize_on_write
from alignedkv_compile.torch_private import fresh_size, generates_triton

from .editor import GraphEditor
from .find_dynamic import metadata_readers
from .nodes import constant, example, fake
from .records import AppendPair
from .replace_attention import AlignmentOptions, StatisticsInputs, replace_attention
from .symbols import express, inputs_by_symbol

EXAMPLE_CAPACITY = 64
"""Rows of the example buffer; the compiled code is for any number."""
MAX_INDEX = 2**31 - 1
"""Largest offset into a buffer or an arena that 32-bit indexing reaches."""


@dataclass(frozen=True)
class AppendInputs:
    """The graph inputs that stand in for one layer's past."""

    key_buffer: Node
    value_buffer: Node
    planes: Node | None


def rewrite_append(
    pair: AppendPair, number: int, editor: GraphEditor, options: AlignmentOptions, statistics: StatisticsInputs
) -> AppendInputs:
    """Rewrite one pair of concatenations.

    Args:
        number: of the pair in its graph, for the placeholders' names.
    """
    symbols = inputs_by_symbol(node for node in editor.graph.nodes if node.op == "placeholder")
    inputs = _inputs(pair, number, editor, with_planes=options.tolerance > 0)
    order = {node: position for position, node in enumerate(editor.graph.nodes)}
    later = max(pair.key_result, pair.value_result, key=order.__getitem__)
    new_key, new_value = editor.current(pair.new_key), editor.current(pair.new_value)
    with editor.before(later.next, later):
        past_length = express(fake(pair.key).shape[2], symbols, editor.function)
        length = _plus(past_length, pair.new_rows, editor)
        steps = editor.function(torch.arange, pair.new_rows, device=fake(pair.key).device)
        positions = editor.function(operator.add, steps, past_length)  # type: ignore[arg-type]
        editor.method("index_copy_", inputs.key_buffer, 2, positions, new_key)
        editor.method("index_copy_", inputs.value_buffer, 2, positions, new_value)
        if inputs.planes is not None:
            capacity = editor.method("size", inputs.key_buffer, 2)
            editor.function(quantize_on_write.default, inputs.planes, new_key, new_value, positions, capacity)
    for site in pair.sites:
        replace_attention(
            site,
            editor,
            options,
            key=inputs.key_buffer,
            value=inputs.value_buffer,
            planes=inputs.planes,
            length=length,
            statistics=statistics,
        )
    _express_metadata(pair, editor)
    _drop_concatenations(pair, editor)
    return inputs


def largest_capacity(key: torch.Tensor, value: torch.Tensor) -> int | None:
    """Rows that a buffer may have in compiled code; None where there is no limit.

    Where Inductor generates Triton, it indexes with 32 bits and guards on sizes; but nobody could evaluate a guard on the
    capacity, which is no size of Dynamo's. So the capacity is declared to be small enough, and the runtime sees to it.
    """
    if not generates_triton(key.device):
        return None
    heads = constant(key.shape[0]) * constant(key.shape[1])
    arena = ArenaLayout(heads, BLOCK_ROWS, constant(key.shape[3]), constant(value.shape[3]))
    return MAX_INDEX // arena.total * BLOCK_ROWS


def _plus(past_length: object, rows: int, editor: GraphEditor) -> Node | int:
    if isinstance(past_length, int):
        return past_length + rows
    assert isinstance(past_length, Node)
    return editor.function(operator.add, past_length, rows)


def _inputs(pair: AppendPair, number: int, editor: GraphEditor, *, with_planes: bool) -> AppendInputs:
    key, value = fake(pair.key), fake(pair.value)
    batch = key.shape[0]
    heads, key_dim, value_dim = constant(key.shape[1]), constant(key.shape[3]), constant(value.shape[3])
    largest = largest_capacity(key, value)
    capacity = fresh_size(editor.fake_mode, EXAMPLE_CAPACITY, f"alignedkv_capacity_{number}", largest)
    # The layout is written for ints; symbolic sizes compute alike.
    arena = ArenaLayout(batch * heads, cast(int, capacity), key_dim, value_dim)
    names = [f"alignedkv_{part}_{number}" for part in ("key_buffer", "value_buffer", "append_planes")]
    return AppendInputs(
        key_buffer=editor.placeholder(names[0], (batch, heads, capacity, key_dim), key.dtype, key.device),
        value_buffer=editor.placeholder(names[1], (batch, heads, capacity, value_dim), value.dtype, key.device),
        planes=editor.placeholder(names[2], (arena.total,), torch.uint8, key.device) if with_planes else None,
    )


def _express_metadata(pair: AppendPair, editor: GraphEditor) -> None:
    """Sizes of the past and of the concatenation become expressions over the graph's other inputs."""
    symbols = inputs_by_symbol(node for node in editor.graph.nodes if node.op == "placeholder")
    for operand in (pair.sites[0].key, pair.sites[0].value):
        for reader in metadata_readers(operand):
            if not reader.users:
                editor.erase(reader)
                continue
            with editor.before(reader, reader):
                value = express(example(reader), symbols, editor.function)
            editor.replace(reader, value)


def _drop_concatenations(pair: AppendPair, editor: GraphEditor) -> None:
    output = editor.graph.output_node()
    dropped = (pair.key_result, pair.value_result)
    kept: list[Argument] = [value for value in output.args[0] if value not in dropped]  # type: ignore[union-attr]
    output.args = (tuple(kept),)
    for node in (pair.key_result, pair.value_result, pair.key, pair.value):
        editor.erase(node)
