"""Caches that a graph writes but that no ``scaled_dot_product_attention`` of it reads: they are reported, never touched.

This is how attention written out as matmul, softmax, matmul, or a cache of latents, appears in the report.
"""

from __future__ import annotations

from collections.abc import Collection

from torch.fx import Node

from .facts import GraphFacts
from .find_dynamic import CROPPED, METADATA, append_parts
from .find_static import ROLLED, is_index_copy, written_cache
from .nodes import operation
from .records import DeclinedSite
from .views import fold

_Cache = tuple[Node, Node, object]
"""Source placeholder, the tensor that holds the rows after the write, and what K and V of one layer have in common."""


def unread_caches(facts: GraphFacts, claimed: Collection[Node], first_index: int) -> tuple[DeclinedSite, ...]:
    """One entry for each pair of caches that is written, but read by no recognised attention.

    Args:
        claimed: sources that other records speak of already.
        first_index: report index of the first entry.
    """
    caches: dict[Node, _Cache] = {}
    for node in facts.graph.nodes:
        cache = _cache_written_by(node, facts)
        if cache is not None and cache[0] not in claimed:
            caches.setdefault(cache[0], cache)
    return tuple(_decline(group, first_index + number, facts) for number, group in enumerate(_in_pairs(list(caches.values()))))


def _cache_written_by(node: Node, facts: GraphFacts) -> _Cache | None:
    if is_index_copy(node):
        source = written_cache(node, facts)
        positions = node.args[2] if len(node.args) > 2 else node.kwargs.get("index")
        return None if source is None else (source, source, positions)
    parts = append_parts(node)
    if parts is not None and facts.is_returned(node):
        return parts[0], node, "cat"
    if operation(node) == "copy_":
        source = written_cache(node.args[0], facts)  # type: ignore[arg-type]
        rolled = source is not None and any(operation(reader) == "roll" for reader in source.users)
        return (source, source, "roll") if source is not None and rolled else None
    return None


def _in_pairs(caches: list[_Cache]) -> list[list[_Cache]]:
    """Two caches written one after the other at the same positions are K and V of one layer."""
    groups: list[list[_Cache]] = []
    for cache in caches:
        if groups and len(groups[-1]) == 1 and groups[-1][0][2] == cache[2]:
            groups[-1].append(cache)
        else:
            groups.append([cache])
    return groups


def _decline(group: list[_Cache], index: int, facts: GraphFacts) -> DeclinedSite:
    readers = [reader for _, rows, _ in group for reader in _readers(rows, facts)]
    sources = tuple(source for source, _, _ in group)
    if any(kind == "roll" for _, _, kind in group):
        return DeclinedSite(index, group[0][1], sources, ROLLED)
    if any(kind == "cat" and rows not in facts.outputs for _, rows, kind in group):
        return DeclinedSite(index, group[0][1], sources, CROPPED)
    if not readers:
        return DeclinedSite(index, group[0][1], sources, "no attention of this graph reads the cache")
    first = min(readers, key=facts.order.__getitem__)
    reason = f"cache read by {operation(first)}: attention is not scaled_dot_product_attention"
    return DeclinedSite(index, first, sources, reason)


def _readers(rows: Node, facts: GraphFacts) -> list[Node]:
    """What reads a cache's data, behind views and casts."""
    found, pending, seen = [], list(facts.aliases(rows)), set()
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        for reader in node.users:
            if operation(reader) in METADATA or operation(reader) == "output" or is_index_copy(reader):
                continue
            if fold(reader).chain and reader.args[0] is node:
                pending.append(reader)
            else:
                found.append(reader)
    return found
