"""Attention over a sliding window that is concatenated and cropped each step (``DynamicSlidingWindowLayer``).

  - key = cat([past_key, new_key], -2)                       # past_key: a graph input, the last W - 1 rows
  - kept_key = key[:, :, -(W - 1):, :]                       # a graph output: the next past
  + position, an input: int64 [1], where the past begins in the buffer
  + positions = arange(new_rows) + position + past_length
  + key_buffer.index_copy_(2, positions, new_key)            # [B, H, capacity, D], capacity a symbol of its own
  + alignedkv.quantize_on_write(planes, new_key, new_value, positions, capacity)
  + mask = zeros(capacity).index_copy(-1, arange(past_length + new_rows) + position, mask)
  - scaled_dot_product_attention(query, key, value, mask)
  + alignedkv.aligned_read_attention(query, key_buffer, value_buffer, planes, mask, length=capacity, ...)

As with a cache that only grows (:mod:`.dynamic`), the past leaves the inputs and what is kept leaves the outputs: the caller
gets views of the last rows of the buffers.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import Argument

from alignedkv_compile.contract import CallSettings, Outcome
from alignedkv_compile.errors import CacheTooLongError
from alignedkv_compile.ops import quantize_on_write
from alignedkv_compile.reasons import Reason
from alignedkv_compile.state.append_buffers import AppendBuffer, AppendBuffers

from ..attention import check_cache_pair, is_prefill, site_over
from ..editor import GraphEditor
from ..facts import GraphFacts
from ..nodes import Declined, fake, operation, row_slice
from ..records import AttentionSite, CacheOperand
from ..replace_attention import AlignmentOptions, CacheRead, StatisticsInputs, replace_attention
from ..symbols import express, inputs_by_symbol
from ..views import Fold, head_repeats
from .concatenation import (
    Concatenation,
    check_lengths,
    check_readers,
    concatenation,
    data_readers,
    express_metadata,
    metadata_readers,
)
from .dynamic import NO_CUDA_GRAPHS, BufferInputs, buffer_inputs
from .kind import CandidateCall, Expected, Positions, WrittenCache
from .window_mask import WindowRows, mask_over_window


@dataclass(frozen=True)
class Crop:
    """A concatenation of which the graph returns the last ``rows`` rows, as ``kept``."""

    parts: Concatenation
    kept: Node
    rows: int


class CroppedKind:
    """Concatenations of a graph input with new rows, of which the graph returns the last rows."""

    name = "cropped"
    uncertifiable = ""

    def claims(self, rows: Node, facts: GraphFacts) -> bool:
        return _crop(rows, facts) is not None

    def site(self, candidate: CandidateCall, facts: GraphFacts) -> AttentionSite:
        key, value = _known_crop(candidate.key.base, facts), _known_crop(candidate.value.base, facts)
        check_cache_pair(key.parts.past, value.parts.past)
        if key.rows != value.rows:
            raise Declined(Reason.LENGTH, "K and V are windows of different lengths")
        operands = [_operand(folded, crop) for folded, crop in ((candidate.key, key), (candidate.value, value))]
        if not is_prefill(candidate.call):
            for crop, name in ((key, "K"), (value, "V")):
                check_readers(crop.parts, name, facts, frozenset([crop.kept]))
            check_lengths(key.parts, value.parts, facts)
        return site_over(candidate.call, self, candidate.index, *operands)

    def pair(self, sites: Sequence[AttentionSite], facts: GraphFacts) -> CroppedPair | None:
        rewritten = tuple(site for site in sites if site.outcome is Outcome.REWRITTEN)
        if not rewritten:
            return None
        key, value = _known_crop(sites[0].key.rows, facts), _known_crop(sites[0].value.rows, facts)
        calls = {site.attention for site in rewritten}
        for crop, name in ((key, "K"), (value, "V")):
            if not data_readers(crop.parts.result, name, facts, frozenset([crop.kept])) <= calls:
                raise Declined(Reason.SECOND_READER, "another attention call over the same cache is not rewritten")
        return CroppedPair(key, value, int(fake(key.parts.new).shape[2]), rewritten)

    def written_by(self, node: Node, facts: GraphFacts) -> WrittenCache | None:
        crop = _crop(node, facts)
        return None if crop is None else WrittenCache(crop.parts.past, node, "cat")


CROPPED = CroppedKind()


@dataclass(frozen=True)
class CroppedPair:
    """One layer's concatenated and cropped K and V, to be replaced by a buffer whose first live row moves.

    Attributes:
        new_rows: rows appended.
        sites: the attention calls over the pair; all are REWRITTEN.
    """

    key: Crop
    value: Crop
    new_rows: int
    sites: tuple[AttentionSite, ...]
    preallocated: tuple[Node, ...] = ()

    def expected(self, options: AlignmentOptions) -> Expected:
        crops = (self.key, self.value)
        metadata = frozenset(node.name for crop in crops for node in metadata_readers(crop.parts))
        chains = {node.name for site in self.sites for node in (*site.key.chain, *site.value.chain)}
        replaced = {node.name for crop in crops for node in (crop.parts.past, crop.parts.result, crop.kept)}
        return Expected(metadata | chains | replaced, metadata, int(options.tolerance > 0))

    def rewrite(
        self, number: int, editor: GraphEditor, options: AlignmentOptions, statistics: StatisticsInputs
    ) -> CroppedInputs:
        symbols = inputs_by_symbol(node for node in editor.graph.nodes if node.op == "placeholder")
        key, value = self.key.parts, self.value.parts
        past, device = fake(key.past), fake(key.past).device
        buffers = buffer_inputs(past, fake(value.past), number, editor, with_planes=options.tolerance > 0)
        position = editor.placeholder(f"alignedkv_position_{number}", (1,), torch.int64, device)
        new_key, new_value = editor.current(key.new), editor.current(value.new)
        with editor.after_both(key.result, value.result):
            past_length: Any = express(past.shape[2], symbols, editor.function)
            end = editor.function(operator.add, position, past_length)
            steps = editor.function(torch.arange, self.new_rows, device=device)
            positions = editor.function(operator.add, steps, end)
            editor.method("index_copy_", buffers.key, 2, positions, new_key)
            editor.method("index_copy_", buffers.value, 2, positions, new_value)
            capacity = editor.size(buffers.key, 2)
            if buffers.planes is not None:
                editor.function(quantize_on_write.default, buffers.planes, new_key, new_value, positions, capacity)
            rows = WindowRows(position, editor.plus(past_length, self.new_rows), capacity)
        for site in self.sites:
            replace_attention(site, editor, options, statistics, functools.partial(self._read, buffers, rows))
        express_metadata((key, value), editor)
        self._drop_concatenations(editor)
        return CroppedInputs(self, buffers, position)

    def _read(self, buffers: BufferInputs, rows: WindowRows, site: AttentionSite, editor: GraphEditor) -> CacheRead:
        return CacheRead(buffers.key, buffers.value, buffers.planes, rows.capacity, mask_over_window(site, rows, editor))

    def _drop_concatenations(self, editor: GraphEditor) -> None:
        output = editor.graph.output_node()
        dropped = (self.key.kept, self.value.kept)
        kept: list[Argument] = [value for value in output.args[0] if value not in dropped]  # type: ignore[union-attr]
        output.args = (tuple(kept),)
        for node in (*dropped, *(node for crop in (self.key, self.value) for node in (crop.parts.result, crop.parts.past))):
            editor.erase(node)


@dataclass(frozen=True)
class CroppedInputs:
    """The graph inputs that stand in for one layer's past."""

    pair: CroppedPair
    buffers: BufferInputs
    position: Node

    @property
    def dropped_outputs(self) -> frozenset[Node]:
        return frozenset([self.pair.key.kept, self.pair.value.kept])

    def binding(self, positions: Positions) -> CroppedBinding:
        inputs, now, buffers = positions.inputs, positions.now, self.buffers
        return CroppedBinding(
            key_input=inputs.index(self.pair.key.parts.past),
            value_input=inputs.index(self.pair.value.parts.past),
            key_buffer_input=now.index(buffers.key),
            value_buffer_input=now.index(buffers.value),
            position_input=now.index(self.position),
            planes_input=None if buffers.planes is None else now.index(buffers.planes),
            key_outputs=positions.returned(self.pair.key.kept),
            value_outputs=positions.returned(self.pair.value.kept),
            new_rows=self.pair.new_rows,
            kept_rows=self.pair.key.rows,
            largest_capacity=buffers.largest_capacity,
        )


@dataclass(frozen=True)
class CroppedBinding:
    """A buffer that stands in for one layer's window; attributes as those of ``AppendBinding``, and:

    Attributes:
        position_input: position, among the rewritten graph's inputs, of where the past begins in the buffer.
        kept_rows: at most so many rows become the next past.
    """

    key_input: int
    value_input: int
    key_buffer_input: int
    value_buffer_input: int
    position_input: int
    planes_input: int | None
    key_outputs: tuple[int, ...]
    value_outputs: tuple[int, ...]
    new_rows: int
    kept_rows: int
    largest_capacity: int | None = None
    no_cuda_graphs: str = NO_CUDA_GRAPHS

    def bind(self, settings: CallSettings) -> BoundCropped:
        return BoundCropped(self, settings)


class BoundCropped:
    """Hands a buffer that holds the past to the graph, and views of its last rows to the caller."""

    def __init__(self, binding: CroppedBinding, settings: CallSettings) -> None:
        self._binding = binding
        self._buffers = settings.stores.of(AppendBuffers)

    def before_call(self, args: Sequence[Any], inputs: list[object]) -> AppendBuffer:
        binding = self._binding
        past_key, past_value = args[binding.key_input], args[binding.value_input]
        with_planes = binding.planes_input is not None
        buffer = self._buffers.before_call(past_key, past_value, binding.new_rows, with_planes=with_planes, any_start=True)
        if binding.largest_capacity is not None and buffer.capacity > binding.largest_capacity:
            raise CacheTooLongError(buffer.capacity, binding.largest_capacity)
        inputs[binding.key_buffer_input] = buffer.key
        inputs[binding.value_buffer_input] = buffer.value
        inputs[binding.position_input] = torch.tensor([buffer.start], device=past_key.device)
        if binding.planes_input is not None:
            inputs[binding.planes_input] = buffer.planes
        return buffer

    def after_call(self, held: AppendBuffer, args: Sequence[Any], outputs: list[object]) -> None:
        binding = self._binding
        key_view, value_view = self._buffers.after_call(held, binding.new_rows, binding.kept_rows)
        for position in binding.key_outputs:
            outputs[position] = key_view
        for position in binding.value_outputs:
            outputs[position] = value_view

    def failed(self, held: AppendBuffer) -> None:
        """The past has lost its claim on the buffer already: who continues it gets a copy."""


def _crop(result: Node, facts: GraphFacts) -> Crop | None:
    """The crop of a concatenation that the graph returns, if it returns one and not the concatenation itself."""
    parts = concatenation(result)
    if parts is None or result in facts.outputs:
        return None
    for reader in result.users:
        rows = _kept_rows(reader) if reader.args[:1] == (result,) else None
        if rows is not None and reader in facts.outputs and all(operation(user) == "output" for user in reader.users):
            return Crop(parts, reader, rows)
    return None


def _known_crop(result: Node, facts: GraphFacts) -> Crop:
    crop = _crop(result, facts)
    assert crop is not None
    return crop


def _kept_rows(node: Node) -> int | None:
    """``n`` of ``x[:, :, -n:, :]``."""
    rows = row_slice(node)
    if rows is None or rows.stop is not None or rows.step is not None:
        return None
    return -rows.start if isinstance(rows.start, int) and rows.start < 0 else None


def _operand(folded: Fold, crop: Crop) -> CacheOperand:
    if fake(crop.parts.past).dtype != fake(crop.parts.new).dtype:
        raise Declined(Reason.DTYPE, "past and new rows have different dtypes")
    return CacheOperand(crop.parts.past, crop.parts.result, folded.chain, head_repeats(folded))
