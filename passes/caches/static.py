"""Attention over a preallocated cache (``StaticCache``): planes beside the cache, which stays as it is.

  key_cache.index_copy_(2, positions, new_key)            # placeholders, written in place
  value_cache.index_copy_(2, positions, new_value)
+ alignedkv.quantize_on_write(planes, new_key, new_value, positions, capacity)
- scaled_dot_product_attention(query, repeat_kv(key_cache), repeat_kv(value_cache), mask, scale=scale)
+ alignedkv.aligned_read_attention(query, key_cache, value_cache, planes, mask, length=capacity, scale=scale, ...)

Rows are written in any of the forms of :mod:`.rows`. The attention reads the placeholder, its first rows (``length`` is how
many), or ``index_copy_``'s result, which is the same tensor: the dependency is program order.
With certified reads it is ``certified_read_attention``, with its ``bounds``.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch.fx import Node

from alignedkv_compile.break_even import ReadShape
from alignedkv_compile.contract import CallSettings, Outcome
from alignedkv_compile.ops import quantize_on_write
from alignedkv_compile.reasons import Reason
from alignedkv_compile.state.sidecar import RebuildHistory, Sidecar, SidecarStore

from ..attention import check_cache_pair, site_over
from ..editor import GraphEditor
from ..facts import GraphFacts
from ..nodes import Declined, arguments, equal, fake, operation
from ..records import AttentionSite, CacheOperand
from ..replace_attention import StatisticsInputs, TensorRead, mask_of, replace_attention
from ..views import Fold, head_repeats
from ..worth import AlignmentOptions, read_shape
from .kind import CandidateCall, Expected, Positions, WrittenCache
from .planes import planes_placeholder
from .rows import INDEX_COPY, RowWrite, first_rows, row_write


@dataclass(frozen=True)
class WritePair:
    """One step's write of K and of V into a pair of preallocated caches, at the same positions."""

    key: RowWrite
    value: RowWrite

    def rows(self, editor: GraphEditor) -> tuple[Node, Node, Node]:
        """New rows of K and of V, ``[B, H, S, D]``, and their positions, int64 ``[S]``, for what is inserted behind both."""
        return self.key.new_rows(editor), self.value.new_rows(editor), self.key.positions(editor)


class StaticKind:
    """Placeholders that the graph writes rows of."""

    name = "static"
    uncertifiable = ""

    def read_shape(self, site: AttentionSite) -> ReadShape:
        return read_shape(site, fixed_rows=True)

    def claims(self, rows: Node, facts: GraphFacts) -> bool:
        return written_cache(rows, facts) is not None

    def site(self, candidate: CandidateCall, facts: GraphFacts) -> AttentionSite:
        key_cache, value_cache = (written_cache(folded.base, facts) for folded in (candidate.key, candidate.value))
        assert key_cache is not None
        assert value_cache is not None
        check_cache_pair(key_cache, value_cache)
        last = _last_write(write_pairs(key_cache, value_cache, facts), candidate.call.node, facts)
        key = _operand(candidate.key, key_cache, last.key.node, facts)
        value = _operand(candidate.value, value_cache, last.value.node, facts)
        if not equal(fake(key.rows).shape[2], fake(value.rows).shape[2]):
            raise Declined(Reason.LENGTH, "attention reads different numbers of rows of K and of V")
        return site_over(candidate.call, self, candidate.index, key, value)

    def pair(self, sites: Sequence[AttentionSite], facts: GraphFacts) -> StaticPair:
        key, value = sites[0].key.source, sites[0].value.source
        return StaticPair(key, value, write_pairs(key, value, facts), tuple(sites))

    def written_by(self, node: Node, facts: GraphFacts) -> WrittenCache | None:
        source = written_cache(node, facts) if operation(node) == "index_copy_" and row_write(node) else None
        return None if source is None else WrittenCache(source, source, arguments(node, INDEX_COPY).get("index"))


STATIC = StaticKind()


@dataclass(frozen=True)
class StaticPair:
    """Two placeholders ``[B, H, C, D]`` that are one layer's K and V, or several layers' that share them.

    Attributes:
        key, value: the placeholders.
        writes: every write of the pair in the graph, in order.
        sites: the attention calls over it that are REWRITTEN or PREFILL.
    """

    key: Node
    value: Node
    writes: tuple[WritePair, ...]
    sites: tuple[AttentionSite, ...]

    @property
    def preallocated(self) -> tuple[Node, ...]:
        return self.key, self.value

    def expected(self, options: AlignmentOptions) -> Expected:
        chains = (node.name for site in self.sites for node in (*site.key.chain, *site.value.chain))
        return Expected(frozenset(chains), frozenset(), len(self.writes) if options.tolerance > 0 else 0)

    def rewrite(
        self, number: int, editor: GraphEditor, options: AlignmentOptions, statistics: StatisticsInputs
    ) -> StaticInputs | None:
        planes = planes_placeholder(self.key, self.value, number, editor) if options.tolerance > 0 else None
        for write in self.writes if planes is not None else ():
            with editor.after_both(write.key.node, write.value.node):
                editor.function(quantize_on_write.default, planes, *write.rows(editor), editor.size(self.key, 2))
        for site in self.sites:
            if site.outcome is Outcome.REWRITTEN:
                replace_attention(site, editor, options, statistics, functools.partial(self._read, planes))
        return None if planes is None else StaticInputs(self.key, self.value, planes)

    def _read(self, planes: Node | None, site: AttentionSite, editor: GraphEditor) -> TensorRead:
        return TensorRead(self.key, self.value, planes, length=_length(site, editor), mask=mask_of(site, editor))


@dataclass(frozen=True)
class StaticInputs:
    """A pair of cache placeholders, and that of their planes."""

    key: Node
    value: Node
    planes: Node
    dropped_outputs: frozenset[Node] = frozenset()

    def binding(self, positions: Positions) -> StaticBinding:
        inputs = positions.inputs
        return StaticBinding(inputs.index(self.key), inputs.index(self.value), positions.now.index(self.planes))


@dataclass(frozen=True)
class StaticBinding:
    """A plane arena that rides beside a pair of preallocated cache tensors.

    Attributes:
        key_input, value_input: positions of the cache tensors among Dynamo's example inputs.
        planes_input: position of the arena among the rewritten graph's inputs.
    """

    key_input: int
    value_input: int
    planes_input: int
    no_cuda_graphs: str = ""

    def bind(self, settings: CallSettings) -> BoundStatic:
        return BoundStatic(self, settings)


class BoundStatic:
    """Hands the planes of whatever pair of caches comes to the graph, and remembers the caches as the call left them."""

    def __init__(self, binding: StaticBinding, settings: CallSettings) -> None:
        self._binding = binding
        self._settings = settings
        self._sidecars = settings.stores.of(SidecarStore)
        self._history: RebuildHistory | None = None

    def before_call(self, args: Sequence[Any], inputs: list[object]) -> Sidecar:
        key, value = args[self._binding.key_input], args[self._binding.value_input]
        trust = self._settings.trust_unversioned
        sidecar = self._sidecars.before_call(key, value, self._history, trust_unversioned=trust)
        self._history = sidecar.history
        if not sidecar.valid:
            self._settings.note(sidecar.history.stale_reason)
        inputs[self._binding.planes_input] = sidecar.planes
        return sidecar

    def after_call(self, held: Sidecar, args: Sequence[Any], outputs: list[object]) -> None:
        held.record(args[self._binding.key_input], args[self._binding.value_input])

    def failed(self, held: Sidecar) -> None:
        held.mark_stale()


def written_cache(node: Node, facts: GraphFacts) -> Node | None:
    """The placeholder that a tensor is, when the graph writes it: itself, or behind ``index_copy_`` results."""
    while operation(node) == "index_copy_":
        node = arguments(node, INDEX_COPY)["self"]  # type: ignore[assignment]
    return node if facts.is_cache_input(node) and facts.writers(node) else None


def write_pairs(key: Node, value: Node, facts: GraphFacts) -> tuple[WritePair, ...]:
    """Every write of a pair of caches, K's first write with V's first and so on.

    Raises:
        Declined: a cache is written in any other way, or K and V at different positions.
    """
    key_writes, value_writes = _row_writes(key, "K", facts), _row_writes(value, "V", facts)
    if len(key_writes) != len(value_writes):
        raise Declined(Reason.SECOND_WRITER, f"K is written {len(key_writes)} times and V {len(value_writes)} times")
    pairs = tuple(_write_pair(*written, facts) for written in zip(key_writes, value_writes, strict=True))
    for earlier, later in itertools.pairwise(pairs):
        if max(_order(earlier, facts)) > min(_order(later, facts)):
            raise Declined(Reason.WRITE_ORDER, "K and V are written twice before the pair is complete")
    return pairs


def _last_write(writes: tuple[WritePair, ...], attention: Node, facts: GraphFacts) -> WritePair:
    """The write whose rows attention sees."""
    before = [pair for pair in writes if _order(pair, facts)[0] < facts.order[attention]]
    if not before:
        raise Declined(Reason.WRITE_ORDER, "the cache is written after the attention reads it")
    if _order(before[-1], facts)[1] > facts.order[attention]:
        raise Declined(Reason.WRITE_ORDER, "the attention reads the cache between the writes of K and of V")
    return before[-1]


def _order(pair: WritePair, facts: GraphFacts) -> tuple[int, int]:
    return facts.order[pair.key.node], facts.order[pair.value.node]


def _row_writes(cache: Node, name: str, facts: GraphFacts) -> list[RowWrite]:
    """Every write of a cache, in order."""
    facts.check_unshared(cache, name)
    found = []
    for writer in facts.writers(cache):
        write = row_write(writer)
        if write is None or written_cache(write.cache, facts) is not cache:
            raise Declined(Reason.SECOND_WRITER, f"{name} is also written by {operation(writer)}")
        if problem := write.problem(name):
            raise Declined(Reason.WRITE_ORDER, problem)
        found.append(write)
    return found


def _write_pair(key: RowWrite, value: RowWrite, facts: GraphFacts) -> WritePair:
    if not key.is_at(value, facts):
        raise Declined(Reason.WRITE_ORDER, "K and V are written at different positions")
    first, last = sorted((key.node, value.node), key=facts.order.__getitem__)
    if any(facts.written_between(operand, first, last) for operand in (*key.operands, *value.operands)):
        raise Declined(Reason.WRITE_ORDER, "the new rows or their positions change between the writes of K and of V")
    return WritePair(key, value)


def _operand(folded: Fold, cache: Node, write: Node, facts: GraphFacts) -> CacheOperand:
    for node in folded.chain:
        before_write = facts.order[node] < facts.order[write]
        if before_write and not facts.shares_storage(cache, node):
            raise Declined(Reason.WRITE_ORDER, "attention reads a copy of the cache that was made before the write")
    if folded.chain and first_rows(folded.chain[0]) is not None:
        rows, behind = folded.chain[0], folded.chain[1:]
        return CacheOperand(cache, rows, folded.chain, head_repeats(replace(folded, base=rows, chain=behind)))
    return CacheOperand(cache, cache, folded.chain, head_repeats(folded))


def _length(site: AttentionSite, editor: GraphEditor) -> Node | int:
    """How many rows of the cache a call reads, at most: its first ones."""
    if site.key.rows is site.key.source:
        return editor.size(site.key.source, 2)
    count = first_rows(site.key.rows)
    assert count is not None
    return editor.current_size(count)
