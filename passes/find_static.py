"""Attention over a preallocated cache (``StaticCache``).

    key_cache.index_copy_(2, positions, new_key)            # placeholders, written in place
    value_cache.index_copy_(2, positions, new_value)
    scaled_dot_product_attention(query, repeat_kv(key_cache), repeat_kv(value_cache), mask, scale=...)

The attention reads the placeholder or ``index_copy_``'s result, which is the same tensor: the dependency is program order.
"""

from __future__ import annotations

import itertools

import torch
from torch.fx import Node

from .attention import check_cache_pair, check_constants, check_mask, check_query, is_long
from .facts import GraphFacts
from .nodes import Declined, arguments, example_size, fake, operation, tensor_of
from .records import AttentionCall, AttentionSite, CacheKind, CacheOperand, Outcome, WritePair
from .views import Fold, head_repeats

ROLLED = "sliding-window cache written by roll/copy_ is not supported yet"

_INDEX_COPY = ("self", "dim", "index", "source")


def is_index_copy(node: Node) -> bool:
    """Whether a node writes rows of a ``[B, H, C, D]`` tensor by ``index_copy_`` on dimension 2."""
    if operation(node) != "index_copy_":
        return False
    bound = arguments(node, _INDEX_COPY)
    target = tensor_of(bound.get("self"))
    return target is not None and target.dim() == 4 and bound.get("dim") in (2, -2)


def written_cache(node: Node, facts: GraphFacts) -> Node | None:
    """The placeholder that a tensor is, when the graph writes it: itself, or behind ``index_copy_`` results."""
    while operation(node) == "index_copy_":
        node = arguments(node, _INDEX_COPY)["self"]  # type: ignore[assignment]
    tensor = tensor_of(node)
    is_cache = operation(node) == "placeholder" and tensor is not None and tensor.dim() == 4 and tensor.is_floating_point()
    return node if is_cache and facts.writers(node) else None


def static_site(call: AttentionCall, key: Fold, value: Fold, index: int, facts: GraphFacts) -> AttentionSite:
    """The record of a call whose K and V are written placeholders.

    Raises:
        Declined: with the reason.
    """
    if not facts.inference_only:
        raise Declined("an input requires grad while grad mode is on: the backend is for inference only")
    key_cache, value_cache = written_cache(key.base, facts), written_cache(value.base, facts)
    assert key_cache is not None
    assert value_cache is not None
    check_cache_pair(key_cache, value_cache)
    writes = write_pairs(key_cache, value_cache, facts)
    before = [pair for pair in writes if facts.order[pair.key] < facts.order[call.node]]
    if not before:
        raise Declined("the cache is written after the attention reads it")
    last = before[-1]
    if facts.order[last.value] > facts.order[call.node]:
        raise Declined("the attention reads the cache between the writes of K and of V")
    operands = [
        _operand(folded, cache, write, rows, last, facts)
        for folded, cache, write, rows in (
            (key, key_cache, last.key, last.new_key),
            (value, value_cache, last.value, last.new_value),
        )
    ]
    rows = fake(call.query).shape[2] if isinstance(call.query, Node) else 0
    query = check_query(call, key_cache, operands[0].repeats)
    if operands[0].repeats != operands[1].repeats:
        raise Declined("K and V heads are repeated differently")
    if is_long(rows):
        hint = example_size(rows)
        return AttentionSite(
            index, call.node, CacheKind.STATIC, Outcome.PREFILL, query, operands[0], operands[1], None, 0.0, hint
        )
    scale = check_constants(call, key_cache)
    mask = check_mask(call, fake(key_cache).shape[2])
    return AttentionSite(
        index, call.node, CacheKind.STATIC, Outcome.REWRITTEN, query, operands[0], operands[1], mask, scale, int(rows)
    )


def write_pairs(key: Node, value: Node, facts: GraphFacts) -> tuple[WritePair, ...]:
    """Every write of a pair of caches, K's first write with V's first and so on.

    Raises:
        Declined: a cache is written in any other way, or K and V at different positions.
    """
    for cache, name in ((key, "K"), (value, "V")):
        _check_memory(cache, name, facts)
    key_writes, value_writes = facts.writers(key), facts.writers(value)
    if len(key_writes) != len(value_writes):
        raise Declined(f"K is written {len(key_writes)} times and V {len(value_writes)} times")
    pairs = tuple(_write_pair(*written, facts) for written in zip(key_writes, value_writes, strict=True))
    for earlier, later in itertools.pairwise(pairs):
        if max(facts.order[earlier.key], facts.order[earlier.value]) > min(facts.order[later.key], facts.order[later.value]):
            raise Declined("K and V are written twice before the pair is complete")
    return pairs


def _check_memory(cache: Node, name: str, facts: GraphFacts) -> None:
    if not fake(cache).stride(3) == 1 and fake(cache).shape[3] != 1:
        raise Declined(f"the last dimension of {name} is not contiguous")
    others = [other for other in facts.placeholders if other is not cache and facts.shares_storage(cache, other)]
    if others:
        raise Declined(f"{name} shares its storage with another input ({others[0].name})")
    writers = facts.writers(cache)
    for writer in writers:
        if operation(writer) == "copy_":
            raise Declined(ROLLED)
        if not is_index_copy(writer) or written_cache(writer, facts) is not cache:
            raise Declined(f"{name} is also written by {operation(writer)}")
        _check_write(writer, cache, name)


def _check_write(write: Node, cache: Node, name: str) -> None:
    bound = arguments(write, _INDEX_COPY)
    rows, positions, tensor = tensor_of(bound.get("source")), tensor_of(bound.get("index")), fake(cache)
    if rows is None or rows.dim() != 4 or rows.dtype != tensor.dtype:
        raise Declined(f"the rows written to {name} are no 4-D tensor of its dtype")
    if positions is None or positions.dim() != 1 or positions.dtype != torch.int64:
        raise Declined(f"the positions written to {name} are no 1-D int64 tensor")


def _write_pair(key: Node, value: Node, facts: GraphFacts) -> WritePair:
    key_bound, value_bound = arguments(key, _INDEX_COPY), arguments(value, _INDEX_COPY)
    new_key, new_value, positions = key_bound["source"], value_bound["source"], key_bound["index"]
    assert isinstance(new_key, Node)
    assert isinstance(new_value, Node)
    assert isinstance(positions, Node)
    if positions is not value_bound["index"]:
        raise Declined("K and V are written at different positions")
    first, last = sorted((key, value), key=facts.order.__getitem__)
    if any(facts.written_between(operand, first, last) for operand in (new_key, new_value, positions)):
        raise Declined("the new rows or their positions change between the writes of K and of V")
    return WritePair(key, value, new_key, new_value, positions)


def _operand(folded: Fold, cache: Node, write: Node, new_rows: Node, last: WritePair, facts: GraphFacts) -> CacheOperand:
    for node in folded.chain:
        before_write = facts.order[node] < facts.order[write]
        if before_write and not facts.shares_storage(cache, node):
            raise Declined("attention reads a copy of the cache that was made before the write")
    return CacheOperand(cache, write, new_rows, last.positions, folded.chain, head_repeats(folded))
