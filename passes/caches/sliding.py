"""Attention over a preallocated sliding window that is full (``StaticSlidingWindowLayer``): every step shifts the cache.

    rolled = roll(cache, -1, dims=-2)                        # one new row
    rolled[:, :, tensor([-1])] = new
    cache.copy_(rolled)
    scaled_dot_product_attention(query, cache, ...)

    longer = cat((cache[:, :, 1:], new), dim=-2)             # several
    cache.copy_(longer[:, :, -W:])
    scaled_dot_product_attention(query, longer, ...)

The shift stays, for the model's cache is authoritative. Beside it the rows are appended to a buffer of the runtime's
(:mod:`alignedkv_compile.state.windows`), and attention reads that, with its planes:

  + positions = arange(new_rows) + position                  # int64 [1], an input: where the window ends in the buffer
  + key_buffer.index_copy_(2, positions, new_key)
  + alignedkv.quantize_on_write(planes, new_key, new_value, positions, capacity)
  + window = arange(W - 1 + new_rows) + position - (W - 1)
  + mask = zeros(capacity).index_copy(-1, window, mask)
  - scaled_dot_product_attention(query, key, value, mask)
  + alignedkv.aligned_read_attention(query, key_buffer, value_buffer, planes, mask, length=capacity, ...)

While the window is not full yet, its cache is written by ``index_copy_`` as any static one.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.fx import Node

from alignedkv_compile.break_even import ReadShape
from alignedkv_compile.contract import CallSettings, Outcome
from alignedkv_compile.layout import ArenaLayout
from alignedkv_compile.ops import quantize_on_write
from alignedkv_compile.reasons import Reason
from alignedkv_compile.state.windows import Window, Windows, window_capacity

from ..attention import check_cache_pair, site_over
from ..editor import GraphEditor
from ..facts import GraphFacts
from ..nodes import Declined, arguments, concatenated, constant, fake, operation, row_slice, same, tensor_of
from ..records import AttentionSite, CacheOperand
from ..replace_attention import StatisticsInputs, TensorRead, replace_attention
from ..views import Fold, head_repeats
from ..worth import AlignmentOptions, read_shape
from .kind import CandidateCall, Expected, Positions, WrittenCache
from .window_mask import WindowRows, mask_over_window


@dataclass(frozen=True)
class Shift:
    """One step's shift of a cache.

    Attributes:
        cache: the placeholder, ``[B, H, W, D]``.
        new: ``[B, H, S, D]``, the rows that come in.
        rows: what attention reads, the last ``W - 1`` old rows and the new ones: the cache when ``S`` is 1, else the
            concatenation.
        taken: where the new rows are taken in.
        write: the ``copy_`` node.
    """

    cache: Node
    new: Node
    rows: Node
    taken: Node
    write: Node


class SlidingKind:
    """Placeholders that the graph shifts."""

    name = "sliding"
    uncertifiable = ""

    def read_shape(self, site: AttentionSite) -> ReadShape:
        return read_shape(site, fixed_rows=False)

    def claims(self, rows: Node, facts: GraphFacts) -> bool:
        return _shift_behind(rows, facts) is not None

    def site(self, candidate: CandidateCall, facts: GraphFacts) -> AttentionSite:
        key, value = _shift_behind(candidate.key.base, facts), _shift_behind(candidate.value.base, facts)
        assert key is not None
        assert value is not None
        check_cache_pair(key.cache, value.cache)
        for shift, name in ((key, "K"), (value, "V")):
            facts.check_unshared(shift.cache, name)
            if facts.order[shift.write] > facts.order[candidate.call.scores]:
                raise Declined(Reason.WRITE_ORDER, f"the attention reads {name} before it is shifted")
        end = max(key.write, value.write, key=facts.order.__getitem__)
        if any(facts.written_between(shift.new, shift.taken, end) for shift in (key, value)):
            raise Declined(Reason.WRITE_ORDER, "the new rows change before both K and V are shifted")
        if not same(fake(key.cache).shape[2], fake(value.cache).shape[2]) or not _same_rows(key.new, value.new):
            raise Declined(Reason.LENGTH, "K and V are windows of different lengths")
        operands = [_operand(folded, shift, facts) for folded, shift in ((candidate.key, key), (candidate.value, value))]
        return site_over(candidate.call, self, candidate.index, *operands)

    def pair(self, sites: Sequence[AttentionSite], facts: GraphFacts) -> SlidingPair | None:
        rewritten = tuple(site for site in sites if site.outcome is Outcome.REWRITTEN)
        if not rewritten:
            return None
        key, value = _shift_behind(sites[0].key.rows, facts), _shift_behind(sites[0].value.rows, facts)
        assert key is not None
        assert value is not None
        return SlidingPair(key, value, constant(fake(key.new).shape[2]), rewritten)

    def written_by(self, node: Node, facts: GraphFacts) -> WrittenCache | None:
        if operation(node) != "copy_" or not isinstance(node.args[0], Node):
            return None
        shift = _shift(node.args[0], facts)
        return None if shift is None else WrittenCache(shift.cache, shift.rows, "shift")


SLIDING = SlidingKind()


@dataclass(frozen=True)
class SlidingPair:
    """The shifts of one layer's K and V, ``new_rows`` at a time, with the REWRITTEN calls over the windows."""

    key: Shift
    value: Shift
    new_rows: int
    sites: tuple[AttentionSite, ...]

    @property
    def preallocated(self) -> tuple[Node, ...]:
        return self.key.cache, self.value.cache

    def expected(self, options: AlignmentOptions) -> Expected:
        chains = (node.name for site in self.sites for node in (*site.key.chain, *site.value.chain))
        return Expected(frozenset(chains), frozenset(), int(options.tolerance > 0))

    def rewrite(
        self, number: int, editor: GraphEditor, options: AlignmentOptions, statistics: StatisticsInputs
    ) -> SlidingInputs:
        inputs = self._inputs(number, editor, with_planes=options.tolerance > 0)
        device = fake(self.key.cache).device
        new_key, new_value = editor.current(self.key.new), editor.current(self.value.new)
        with editor.after_both(self.key.write, self.value.write):
            steps = editor.function(torch.arange, self.new_rows, device=device)
            positions = editor.function(operator.add, steps, inputs.position)
            editor.method("index_copy_", inputs.key_buffer, 2, positions, new_key)
            editor.method("index_copy_", inputs.value_buffer, 2, positions, new_value)
            if inputs.planes is not None:
                capacity = editor.size(inputs.key_buffer, 2)
                editor.function(quantize_on_write.default, inputs.planes, new_key, new_value, positions, capacity)
            old = editor.plus(editor.size(self.key.cache, 2), -1)
            rows = WindowRows(
                first=editor.function(operator.sub, inputs.position, old),
                count=editor.plus(old, self.new_rows),
                capacity=editor.size(inputs.key_buffer, 2),
            )
        for site in self.sites:
            replace_attention(site, editor, options, statistics, functools.partial(self._read, inputs, rows))
        return inputs

    def _read(self, inputs: SlidingInputs, rows: WindowRows, site: AttentionSite, editor: GraphEditor) -> TensorRead:
        mask = mask_over_window(site, rows, editor)
        return TensorRead(inputs.key_buffer, inputs.value_buffer, inputs.planes, length=rows.capacity, mask=mask)

    def _inputs(self, number: int, editor: GraphEditor, *, with_planes: bool) -> SlidingInputs:
        key, value = fake(self.key.cache), fake(self.value.cache)
        batch, heads, rows, key_dim, value_dim = *key.shape, value.shape[3]
        capacity = window_capacity(rows)  # the layout is written for ints; symbolic sizes compute alike
        arena = ArenaLayout(batch * heads, capacity, constant(key_dim), constant(value_dim))
        names = [f"alignedkv_{part}_{number}" for part in ("window_keys", "window_values", "window_position", "window_planes")]
        return SlidingInputs(
            pair=self,
            key_buffer=editor.placeholder(names[0], (batch, heads, capacity, key_dim), key.dtype, key.device),
            value_buffer=editor.placeholder(names[1], (batch, heads, capacity, value_dim), value.dtype, key.device),
            position=editor.placeholder(names[2], (1,), torch.int64, key.device),
            planes=editor.placeholder(names[3], (arena.total,), torch.uint8, key.device) if with_planes else None,
        )


@dataclass(frozen=True)
class SlidingInputs:
    """The graph inputs of one pair's window."""

    pair: SlidingPair
    key_buffer: Node
    value_buffer: Node
    position: Node
    planes: Node | None
    dropped_outputs: frozenset[Node] = frozenset()

    def binding(self, positions: Positions) -> SlidingBinding:
        inputs, now = positions.inputs, positions.now
        return SlidingBinding(
            key_input=inputs.index(self.pair.key.cache),
            value_input=inputs.index(self.pair.value.cache),
            key_buffer_input=now.index(self.key_buffer),
            value_buffer_input=now.index(self.value_buffer),
            position_input=now.index(self.position),
            planes_input=None if self.planes is None else now.index(self.planes),
            new_rows=self.pair.new_rows,
        )


@dataclass(frozen=True)
class SlidingBinding:
    """A window that rides beside a pair of shifted cache tensors.

    Attributes:
        key_input, value_input: positions of the cache tensors among Dynamo's example inputs.
        key_buffer_input, value_buffer_input, position_input, planes_input: positions among the rewritten graph's inputs;
            ``planes_input`` is None at tolerance 0.
        new_rows: how many rows a call shifts in.
    """

    key_input: int
    value_input: int
    key_buffer_input: int
    value_buffer_input: int
    position_input: int
    planes_input: int | None
    new_rows: int
    no_cuda_graphs: str = ""

    def bind(self, settings: CallSettings) -> BoundSliding:
        return BoundSliding(self, settings)


class BoundSliding:
    """Hands the window over whatever pair of caches comes to the graph, and remembers the caches as the call left them."""

    def __init__(self, binding: SlidingBinding, settings: CallSettings) -> None:
        self._binding = binding
        self._settings = settings
        self._windows = settings.stores.of(Windows)

    def before_call(self, args: Sequence[Any], inputs: list[object]) -> Window:
        binding = self._binding
        window = self._windows.before_call(
            args[binding.key_input],
            args[binding.value_input],
            binding.new_rows,
            with_planes=binding.planes_input is not None,
            trust_unversioned=self._settings.trust_unversioned,
        )
        if window.note:
            self._settings.note(window.note)
        inputs[binding.key_buffer_input] = window.key
        inputs[binding.value_buffer_input] = window.value
        inputs[binding.position_input] = window.position
        if binding.planes_input is not None:
            inputs[binding.planes_input] = window.planes
        return window

    def after_call(self, held: Window, args: Sequence[Any], outputs: list[object]) -> None:
        binding = self._binding
        self._windows.after_call(held, args[binding.key_input], args[binding.value_input], binding.new_rows)

    def failed(self, held: Window) -> None:
        """The window has been forgotten already: the next call copies the cache."""


def _shift_behind(rows: Node, facts: GraphFacts) -> Shift | None:
    """The shift whose window a node is, or None."""
    if facts.is_cache_input(rows) or operation(rows) == "copy_":
        shift = _shift(rows if operation(rows) != "copy_" else cast(Node, rows.args[0]), facts)
        return shift if shift is not None and shift.rows is shift.cache else None
    old = _old_and_new(rows)
    if old is None:
        return None
    source = old[0].args[0]
    shift = _shift(source, facts) if isinstance(source, Node) else None
    return shift if shift is not None and shift.rows is rows else None


def _shift(cache: Node, facts: GraphFacts) -> Shift | None:
    """The one write of a placeholder, if it shifts it."""
    writers = facts.writers(cache) if facts.is_cache_input(cache) else ()
    if len(writers) != 1 or operation(writers[0]) != "copy_" or writers[0].args[0] is not cache or len(writers[0].args) != 2:
        return None
    (write,) = writers
    source = write.args[1]
    if not isinstance(source, Node):
        return None
    return _rolled(cache, source, write, facts) or _concatenated(cache, source, write, facts)


def _rolled(cache: Node, rolled: Node, write: Node, facts: GraphFacts) -> Shift | None:
    """``roll(cache, -1, dims=-2)`` whose last row is set."""
    bound = arguments(rolled, ("self", "shifts", "dims"))
    if operation(rolled) != "roll" or bound.get("self") is not cache or bound.get("shifts") not in (-1, (-1,), [-1]):
        return None
    if bound.get("dims") not in (2, -2, (2,), (-2,), [2], [-2]):
        return None
    setters = facts.writers(rolled)
    if len(setters) != 1 or operation(setters[0]) != "setitem" or set(rolled.users) != {setters[0], write}:
        return None
    (setter,) = setters
    target, index, new = setter.args
    whole = slice(None, None, None)
    if target is not rolled or not isinstance(index, tuple) or len(index) != 3 or index[:2] != (whole, whole):
        return None
    if not _is_last(index[2]) or not isinstance(new, Node) or not _fits(new, cache) or not same(fake(new).shape[2], 1):
        return None
    return Shift(cache, new, cache, setter, write) if facts.order[setter] < facts.order[write] else None


def _is_last(index: object) -> bool:
    """``torch.tensor([-1])`` in the graph."""
    return isinstance(index, Node) and operation(index) == "tensor" and list(index.args[:1]) == [[-1]]


def _concatenated(cache: Node, source: Node, write: Node, facts: GraphFacts) -> Shift | None:
    """``cat((cache[:, :, 1:], new))[:, :, -W:]``."""
    if operation(source) != "getitem" or not isinstance(source.args[0], Node):
        return None
    longer = source.args[0]
    parts = _old_and_new(longer)
    if parts is None or facts.writers(longer) or not same(fake(source).shape[2], fake(cache).shape[2]):
        return None
    old, new = parts
    rows = fake(cache).shape[2]
    if not same(fake(old).shape[2], rows - 1) or not _fits(new, cache) or old.args[0] is not cache:
        return None
    if not _is_tail(source) or not _is_tail(old) or facts.order[longer] > facts.order[write]:
        return None
    return Shift(cache, new, longer, longer, write)


def _old_and_new(node: Node) -> tuple[Node, Node] | None:
    """``(old, new)`` of ``cat((old, new), 2)`` where ``old`` is a slice."""
    parts = concatenated(node, 2)
    return parts if parts is not None and operation(parts[0]) == "getitem" else None


def _is_tail(node: Node) -> bool:
    """``x[:, :, n:]``; how many rows it keeps is in its shape."""
    rows = row_slice(node)
    return rows is not None and rows.stop is None and rows.step is None


def _fits(new: Node, cache: Node) -> bool:
    rows = tensor_of(new)
    return rows is not None and rows.dim() == 4 and rows.dtype == fake(cache).dtype


def _same_rows(left: Node, right: Node) -> bool:
    return same(fake(left).shape[2], fake(right).shape[2])


def _operand(folded: Fold, shift: Shift, facts: GraphFacts) -> CacheOperand:
    for node in folded.chain if shift.rows is shift.cache else ():
        if facts.order[node] < facts.order[shift.write] and not facts.shares_storage(shift.cache, node):
            raise Declined(Reason.WRITE_ORDER, "attention reads a copy of the cache that was made before the shift")
    return CacheOperand(shift.cache, shift.rows, folded.chain, head_repeats(folded))
