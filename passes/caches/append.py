"""Appending rows to a growing buffer in place of ``cat([past, new], -2)``; shared by the kinds whose caches are concatenated.

The past leaves the graph's inputs, and what is kept of the concatenation leaves its outputs: whoever calls the graph passes
the buffers that hold the past (:mod:`alignedkv_compile.state.append_buffers`), and returns views of their live rows. The
concatenation is never materialised, so nothing else may read its data, or the past's.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.fx import Node
from torch.fx.node import Argument

from alignedkv_compile.contract import CallSettings, Outcome
from alignedkv_compile.errors import CacheTooLongError
from alignedkv_compile.layout import BLOCK_ROWS, ArenaLayout
from alignedkv_compile.ops import quantize_on_write
from alignedkv_compile.reasons import Reason
from alignedkv_compile.state.append_buffers import AppendBuffer, AppendBuffers, PastHistory
from alignedkv_compile.torch_private import fresh_size, generates_triton

from ..attention import check_cache_pair, is_prefill, site_over
from ..editor import GraphEditor
from ..facts import GraphFacts
from ..nodes import Declined, constant, fake
from ..records import AttentionSite, CacheOperand
from ..replace_attention import StatisticsInputs, TensorRead, mask_of, replace_attention
from ..symbols import express, inputs_by_symbol
from ..views import Fold, head_repeats
from ..worth import AlignmentOptions
from .concatenation import (
    Concatenation,
    check_lengths,
    check_readers,
    data_readers,
    express_metadata,
    metadata_readers,
)
from .kind import CacheKind, CandidateCall, Expected, Positions
from .window_mask import WindowRows, mask_over_window

EXAMPLE_CAPACITY = 64
"""Rows of the example buffer; the compiled code is for any number."""
MAX_INDEX = 2**31 - 1
"""Largest offset into a buffer or an arena that 32-bit indexing reaches."""
NO_CUDA_GRAPHS = (
    "no CUDA graph: a DynamicCache has another length at every token, and each would be recorded anew (use a StaticCache)"
)


def append_site(
    kind: CacheKind, candidate: CandidateCall, key: Concatenation, value: Concatenation, facts: GraphFacts
) -> AttentionSite:
    """The record of one call over concatenated caches.

    Raises:
        Declined: with the reason.
    """
    check_cache_pair(key.past, value.past)
    operands = _operand(candidate.key, key), _operand(candidate.value, value)
    if not is_prefill(candidate.call):
        for part, name in ((key, "K"), (value, "V")):
            check_readers(part, name, facts, frozenset())
        check_lengths(key, value, facts)
    return site_over(candidate.call, kind, candidate.index, *operands)


def append_pair(
    sites: Sequence[AttentionSite], key: Concatenation, value: Concatenation, facts: GraphFacts
) -> AppendPair | None:
    """All calls over one pair of concatenations; None when none of them is rewritten.

    Raises:
        Declined: one of them is not, though others are.
    """
    rewritten = tuple(site for site in sites if site.outcome is Outcome.REWRITTEN)
    if not rewritten:
        return None
    calls = {site.attention for site in rewritten}
    for part, name in ((key, "K"), (value, "V")):
        if not data_readers(part, name, facts, frozenset()) <= calls:
            raise Declined(Reason.SECOND_READER, "another attention call over the same cache is not rewritten")
    return AppendPair(key, value, int(fake(key.new).shape[2]), rewritten)


@dataclass(frozen=True)
class AppendPair:
    """One layer's concatenated K and V, to be replaced by a growing buffer.

    Attributes:
        key, value: the concatenations.
        new_rows: rows appended.
        sites: the attention calls over the pair; all are REWRITTEN.
    """

    key: Concatenation
    value: Concatenation
    new_rows: int
    sites: tuple[AttentionSite, ...]
    preallocated: tuple[Node, ...] = ()

    def expected(self, options: AlignmentOptions) -> Expected:
        chains = frozenset(node.name for site in self.sites for node in (*site.key.chain, *site.value.chain))
        return expected_append((self.key, self.value), chains, options)

    def rewrite(
        self, number: int, editor: GraphEditor, options: AlignmentOptions, statistics: StatisticsInputs
    ) -> AppendInputs:
        past_key, past_value = fake(self.key.past), fake(self.value.past)
        moving = self.key.kept_rows is not None
        buffers = buffer_inputs(past_key, past_value, number, editor, with_planes=options.tolerance > 0, with_position=moving)
        with editor.after_both(self.key.result, self.value.result):
            new_key, new_value = editor.current(self.key.new), editor.current(self.value.new)
            live = append_rows(buffers, past_key.shape[2], new_key, new_value, self.new_rows, editor)
        for site in self.sites:
            replace_attention(site, editor, options, statistics, functools.partial(live_rows_read, buffers, live))
        drop_concatenations((self.key, self.value), editor)
        return AppendInputs(self.key, self.value, self.new_rows, buffers)


def expected_append(parts: Sequence[Concatenation], chains: frozenset[str], options: AlignmentOptions) -> Expected:
    """What may change where a buffer replaces concatenations.

    Args:
        chains: names of what stands between them and attention.
    """
    metadata = frozenset(node.name for one in parts for node in metadata_readers(one))
    replaced = {node.name for one in parts for node in (one.past, one.result, one.kept)}
    return Expected(metadata | chains | replaced, metadata, int(options.tolerance > 0))


@dataclass(frozen=True)
class BufferInputs:
    """Graph inputs for a growing buffer: ``key [B, H, C, Dk]``, ``value [B, H, C, Dv]``, and their planes or None.

    Attributes:
        position: int64 ``[1]``, where the past begins in the buffer; None where it always begins at the front.
        largest_capacity: rows that the compiled code can address in a buffer, or None.
    """

    key: Node
    value: Node
    planes: Node | None
    position: Node | None
    largest_capacity: int | None


def buffer_inputs(
    key: torch.Tensor,
    value: torch.Tensor,
    number: int,
    editor: GraphEditor,
    *,
    with_planes: bool,
    with_position: bool = False,
) -> BufferInputs:
    """Add the inputs of a buffer that stands in for a past of ``key [B, H, P, Dk]`` and ``value``.

    Args:
        number: of the pair in its graph, for the placeholders' names.
    """
    batch = key.shape[0]
    heads, key_dim, value_dim = constant(key.shape[1]), constant(key.shape[3]), constant(value.shape[3])
    largest = largest_capacity(key, value)
    capacity = fresh_size(editor.fake_mode, EXAMPLE_CAPACITY, f"alignedkv_capacity_{number}", largest)
    # The layout is written for ints; symbolic sizes compute alike.
    arena = ArenaLayout(batch * heads, cast(int, capacity), key_dim, value_dim)
    names = [f"alignedkv_{part}_{number}" for part in ("key_buffer", "value_buffer", "append_planes", "position")]
    return BufferInputs(
        key=editor.placeholder(names[0], (batch, heads, capacity, key_dim), key.dtype, key.device),
        value=editor.placeholder(names[1], (batch, heads, capacity, value_dim), value.dtype, key.device),
        planes=editor.placeholder(names[2], (arena.total,), torch.uint8, key.device) if with_planes else None,
        position=editor.placeholder(names[3], (1,), torch.int64, key.device) if with_position else None,
        largest_capacity=largest,
    )


@dataclass(frozen=True)
class LiveRows:
    """How many rows are live after an append, and how many the buffer has."""

    count: Node | int
    capacity: Node | int


def append_rows(
    buffers: BufferInputs, past_rows: int | torch.SymInt, new_key: Node, new_value: Node, new_rows: int, editor: GraphEditor
) -> LiveRows:
    """Write the new rows behind the past's, in its dtype, as ``cat`` does."""
    new_key, new_value = editor.cast(new_key, fake(buffers.key).dtype), editor.cast(new_value, fake(buffers.value).dtype)
    symbols = inputs_by_symbol(node for node in editor.graph.nodes if node.op == "placeholder")
    past_length: Any = express(past_rows, symbols, editor.function)
    length = editor.plus(past_length, new_rows)
    end = past_length if buffers.position is None else editor.function(operator.add, buffers.position, past_length)
    steps = editor.function(torch.arange, new_rows, device=fake(buffers.key).device)
    positions = editor.function(operator.add, steps, end)
    editor.method("index_copy_", buffers.key, 2, positions, new_key)
    editor.method("index_copy_", buffers.value, 2, positions, new_value)
    capacity = editor.size(buffers.key, 2)
    if buffers.planes is not None:
        editor.function(quantize_on_write.default, buffers.planes, new_key, new_value, positions, capacity)
    return LiveRows(length, capacity)


def live_rows_read(buffers: BufferInputs, live: LiveRows, site: AttentionSite, editor: GraphEditor) -> TensorRead:
    """What a call reads: the first rows of the buffer, or those that begin at its position."""
    if buffers.position is None:
        return TensorRead(buffers.key, buffers.value, buffers.planes, length=live.count, mask=mask_of(site, editor))
    mask = mask_over_window(site, WindowRows(buffers.position, live.count, live.capacity), editor)
    return TensorRead(buffers.key, buffers.value, buffers.planes, length=live.capacity, mask=mask)


def drop_concatenations(parts: Sequence[Concatenation], editor: GraphEditor) -> None:
    """Take what is kept of concatenations out of the graph's outputs and their pasts out of its inputs, once nothing reads
    their data."""
    express_metadata(parts, editor)
    output = editor.graph.output_node()
    dropped = [one.kept for one in parts]
    kept: list[Argument] = [value for value in output.args[0] if value not in dropped]  # type: ignore[union-attr]
    output.args = (tuple(kept),)
    for node in dict.fromkeys((*dropped, *(node for one in parts for node in (one.result, one.past)))):
        editor.erase(node)


@dataclass(frozen=True)
class AppendInputs:
    """A pair of concatenations in the edited graph.

    Attributes:
        key, value: the concatenations.
        new_rows: rows appended.
        store: where the buffers are found.
    """

    key: Concatenation
    value: Concatenation
    new_rows: int
    buffers: BufferInputs
    store: type[AppendBuffers] = AppendBuffers

    @property
    def dropped_outputs(self) -> frozenset[Node]:
        return frozenset([self.key.kept, self.value.kept])

    def binding(self, positions: Positions) -> AppendBinding:
        inputs, now, buffers = positions.inputs, positions.now, self.buffers
        return AppendBinding(
            key_input=inputs.index(self.key.past),
            value_input=inputs.index(self.value.past),
            key_buffer_input=now.index(buffers.key),
            value_buffer_input=now.index(buffers.value),
            planes_input=None if buffers.planes is None else now.index(buffers.planes),
            position_input=None if buffers.position is None else now.index(buffers.position),
            key_outputs=positions.returned(self.key.kept),
            value_outputs=positions.returned(self.value.kept),
            new_rows=self.new_rows,
            kept_rows=self.key.kept_rows,
            largest_capacity=buffers.largest_capacity,
            store=self.store,
        )


@dataclass(frozen=True)
class AppendBinding:
    """A growing buffer that stands in for one layer's concatenated K and V.

    Attributes:
        key_input, value_input: positions of the past tensors among Dynamo's example inputs (they are not passed on).
        key_buffer_input, value_buffer_input, planes_input: positions among the rewritten graph's inputs; ``planes_input`` is
            None at tolerance 0.
        position_input: of the row at which the past begins in the buffer; None where that is the first.
        key_outputs, value_outputs: positions among Dynamo's graph outputs that are filled with views of the buffers' live
            rows; the rewritten graph does not return them.
        new_rows: how many rows a call appends (a query whose length varies keeps stock attention, so it is an int).
        kept_rows: at most so many rows become the next past, the last ones; None for all.
        largest_capacity: rows that the compiled code can address in a buffer, or None.
        store: where the buffers are found.
    """

    key_input: int
    value_input: int
    key_buffer_input: int
    value_buffer_input: int
    planes_input: int | None
    position_input: int | None
    key_outputs: tuple[int, ...]
    value_outputs: tuple[int, ...]
    new_rows: int
    kept_rows: int | None
    largest_capacity: int | None
    store: type[AppendBuffers]
    no_cuda_graphs: str = NO_CUDA_GRAPHS

    def bind(self, settings: CallSettings) -> BoundAppend:
        return BoundAppend(self, settings)


class BoundAppend:
    """Hands a buffer that holds the past to the graph, and views of its live rows to the caller."""

    def __init__(self, binding: AppendBinding, settings: CallSettings) -> None:
        self._binding = binding
        self._settings = settings
        self._buffers = settings.stores.of(binding.store)
        self._history = PastHistory()

    def before_call(self, args: Sequence[Any], inputs: list[object]) -> AppendBuffer:
        binding = self._binding
        past_key, past_value = args[binding.key_input], args[binding.value_input]
        buffer = self._buffers.before_call(
            past_key,
            past_value,
            binding.new_rows,
            with_planes=binding.planes_input is not None,
            any_start=binding.position_input is not None,
            history=self._history,
        )
        if binding.planes_input is not None and self._history.note:
            self._settings.note(self._history.note)
        if binding.largest_capacity is not None and buffer.capacity > binding.largest_capacity:
            raise CacheTooLongError(buffer.capacity, binding.largest_capacity)
        inputs[binding.key_buffer_input] = buffer.key
        inputs[binding.value_buffer_input] = buffer.value
        if binding.planes_input is not None:
            inputs[binding.planes_input] = buffer.planes
        if binding.position_input is not None:
            inputs[binding.position_input] = torch.tensor([buffer.start], device=past_key.device)
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


def _operand(folded: Fold, parts: Concatenation) -> CacheOperand:
    if fake(parts.past).dtype != fake(parts.result).dtype:
        raise Declined(Reason.DTYPE, "past and new rows have different dtypes, and the past would change its own")
    return CacheOperand(parts.past, parts.result, folded.chain, head_repeats(folded))
