"""Attention over ``alignedkv_compile.Cache``, whose storage are the planes: they are read as they are.

  alignedkv.store_rows(planes, new_key, new_value, positions, capacity, storage)
- key, value = alignedkv.load_rows(planes, new_key, new_value, positions, rows, capacity, storage)
- scaled_dot_product_attention(query, repeat_kv(key), repeat_kv(value), mask, scale=scale)
+ alignedkv.packed_read_attention(query, planes, mask, ..., storage, capacity, length=rows, scale=scale, ...)

The cache itself writes the first two lines, so there is nothing to keep beside it, and nothing to bind at run time. With a
query that is too long for the aligned read both stay, and the new rows are attended as they are at hand.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.fx import Node
from torch.fx.node import Argument

from alignedkv_compile.contract import Outcome
from alignedkv_compile.ops import certified_packed_read_attention, load_rows, packed_read_attention, store_rows
from alignedkv_compile.reasons import Reason
from alignedkv_compile.storage import STORAGES, Storage
from alignedkv_compile.torch_private import OpOverload, generates_triton

from ..attention import check_cache_pair, is_prefill, site_over
from ..editor import GraphEditor
from ..facts import GraphFacts
from ..nodes import Declined, constant, example_size, fake, operation
from ..records import AttentionSite, CacheOperand
from ..replace_attention import CacheRead, StatisticsInputs, mask_of, replace_attention
from ..views import Fold, Repeats, head_repeats
from ..worth import AlignmentOptions
from .kind import CandidateCall, Expected, WrittenCache

_PLANES, _KEY, _VALUE, _POSITIONS, _ROWS, _CAPACITY, _STORAGE = range(7)
"""Arguments of ``load_rows``; those of ``store_rows`` are the same without the rows."""


@dataclass(frozen=True)
class PackedKind:
    """K and V that come out of an arena.

    Attributes:
        lossless: whether the arenas hold every bit; those that do are a kind of their own, which can be certified.
    """

    lossless: bool
    name = "packed"

    @property
    def uncertifiable(self) -> str:
        if self.lossless:
            return ""
        return (
            "a cache of few bits has none left for a certified read to take; with guarantee='worst_case' use"
            " alignedkv_compile.Cache(config, 'lossless') or a cache of transformers"
        )

    def read_shape(self, site: AttentionSite) -> None:
        """None: every bit of a row takes decoding, and fewer always pay."""

    def claims(self, rows: Node, facts: GraphFacts) -> bool:
        load = _loaded(rows)
        return load is not None and _storage(load).residual is self.lossless

    def site(self, candidate: CandidateCall, facts: GraphFacts) -> AttentionSite:
        key, value = candidate.key.base, candidate.value.base
        load, other = _loaded(key), _loaded(value)
        assert load is not None
        if other is not load or key.args[1] != 0 or value.args[1] != 1:
            raise Declined(Reason.MIXED_CACHES, "K and V are not those of one layer of the cache")
        check_cache_pair(key, value)
        dtype, device = fake(key).dtype, fake(key).device
        if generates_triton(device) and not _storage(load).has_triton(dtype, device):
            what = f"no kernel for {device.type} reads lossless rows of {dtype}; they are decoded here, by eager code"
            raise Declined(Reason.DEVICE, what)
        call, query = candidate.call, candidate.call.query
        prompt = call.is_causal is True  # causal from the first row on, as transformers asks for a prompt alone
        if (prompt or is_prefill(call)) and isinstance(query, Node):  # which may read a part of the rows, those at hand say
            keys, values = (
                CacheOperand(_node(load, argument), rows, (), Repeats(1)) for argument, rows in ((_KEY, key), (_VALUE, value))
            )
            rows = example_size(fake(query).shape[-2])
            return AttentionSite(candidate.index, call, self, Outcome.PREFILL, query, keys, values, (), 0.0, rows)
        _check_stored(load, call.node, facts)
        return site_over(
            call, self, candidate.index, _operand(candidate.key, load, _KEY), _operand(candidate.value, load, _VALUE)
        )

    def pair(self, sites: Sequence[AttentionSite], facts: GraphFacts) -> PackedPair:
        return PackedPair(tuple(sites))

    def written_by(self, node: Node, facts: GraphFacts) -> WrittenCache | None:
        return None


PACKED, LOSSLESS = PackedKind(lossless=False), PackedKind(lossless=True)


@dataclass(frozen=True)
class PackedRead(CacheRead):
    """A read of an arena that is the cache.

    Attributes:
        load: the ``load_rows`` that it takes the place of.
    """

    load: Node

    def operator(self, statistics: StatisticsInputs) -> OpOverload:
        read = packed_read_attention if statistics.bounds is None else certified_packed_read_attention
        return read.default if statistics.counters is None else read.counted

    @property
    def operands(self) -> tuple[Argument, ...]:
        return (self.load.args[_PLANES],)

    @property
    def attributes(self) -> dict[str, Argument]:
        key, value = fake(self.load.args[_KEY]), fake(self.load.args[_VALUE])  # type: ignore[arg-type]
        return {
            "heads": constant(key.shape[1]),
            "value_dim": constant(value.shape[3]),
            "dtype": key.dtype,
            "storage": self.load.args[_STORAGE],
            "capacity": self.load.args[_CAPACITY],
        }

    @property
    def dtype(self) -> torch.dtype:
        return fake(self.load.args[_KEY]).dtype  # type: ignore[arg-type]


@dataclass(frozen=True)
class PackedPair:
    """One layer's arena, with the attention calls over it."""

    sites: tuple[AttentionSite, ...]

    @property
    def preallocated(self) -> tuple[Node, ...]:
        planes = {_node(_load_of(site), _PLANES) for site in self.sites}
        return tuple(node for node in planes if operation(node) == "placeholder")

    def expected(self, options: AlignmentOptions) -> Expected:
        operands = [operand for site in self.sites for operand in (site.key, site.value)]
        removed = {node.name for operand in operands for node in (*operand.chain, operand.rows)}
        removed |= {_load_of(site).name for site in self.sites}
        reads = sum(site.outcome is Outcome.REWRITTEN for site in self.sites)
        return Expected(frozenset(removed), frozenset(), 0, packed_reads=reads)

    def rewrite(self, number: int, editor: GraphEditor, options: AlignmentOptions, statistics: StatisticsInputs) -> None:
        for site in self.sites:
            if site.outcome is Outcome.REWRITTEN:
                load = _load_of(site)
                replace_attention(site, editor, options, statistics, functools.partial(self._read, load))
                editor.erase_unused((site.key.rows, site.value.rows, load))

    def _read(self, load: Node, site: AttentionSite, editor: GraphEditor) -> PackedRead:
        return PackedRead(length=load.args[_ROWS], mask=mask_of(site, editor), load=load)


def _loaded(rows: Node) -> Node | None:
    """The ``load_rows`` that a node is K or V of."""
    if operation(rows) != "getitem":
        return None
    load = rows.args[0]
    return load if isinstance(load, Node) and load.target is load_rows.default else None


def _storage(load: Node) -> Storage:
    return STORAGES[str(load.args[_STORAGE])]


def _load_of(site: AttentionSite) -> Node:
    load = _loaded(site.key.rows)
    assert load is not None
    return load


def _check_stored(load: Node, attention: Node, facts: GraphFacts) -> None:
    """Refuse to read an arena that does not hold the rows that ``load_rows`` returned, or no longer.

    Raises:
        Declined: with what is missing.
    """
    planes = _node(load, _PLANES)
    before = [writer for writer in facts.writers(planes) if facts.order[writer] < facts.order[attention]]
    last = before[-1] if before else None
    same_rows = last is not None and last.target is store_rows.default and last.args[:_ROWS] == load.args[:_ROWS]
    if not same_rows or last is None or facts.order[last] > facts.order[load]:
        raise Declined(Reason.WRITE_ORDER, "the rows at hand are not those that were stored last")


def _operand(folded: Fold, load: Node, argument: int) -> CacheOperand:
    return CacheOperand(_node(load, argument), folded.base, folded.chain, head_repeats(folded))


def _node(load: Node, argument: int) -> Node:
    node = load.args[argument]
    assert isinstance(node, Node)
    return node
