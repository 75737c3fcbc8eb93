"""Caches that a graph writes but that no attention of it reads: they are reported, never touched.

This is how attention in a form that is not recognised, or a cache of latents, appears in the report.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch.fx import Node

from alignedkv_compile.reasons import Reason

from .caches import KINDS
from .caches.kind import WrittenCache
from .facts import GraphFacts
from .nodes import METADATA, mutated_by, operation
from .records import DeclinedSite
from .views import fold


def unread_caches(facts: GraphFacts, claimed: Collection[Node], first_index: int) -> tuple[DeclinedSite, ...]:
    """One entry for each pair of caches that is written, but read by no recognised attention.

    Args:
        claimed: sources that other records speak of already.
        first_index: report index of the first entry.
    """
    caches: dict[Node, WrittenCache] = {}
    writes: dict[Node, Node] = {}
    for node in facts.graph.nodes:
        written = next((found for kind in KINDS if (found := kind.written_by(node, facts)) is not None), None)
        if written is not None and written.source not in claimed:
            caches.setdefault(written.source, written)
            writes.setdefault(written.source, node)
    groups = _in_pairs(list(caches.values()))
    return tuple(_decline(group, writes, first_index + number, facts) for number, group in enumerate(groups))


def _in_pairs(caches: list[WrittenCache]) -> list[list[WrittenCache]]:
    """Two caches written one after the other at the same positions are K and V of one layer."""
    groups: list[list[WrittenCache]] = []
    for cache in caches:
        if groups and len(groups[-1]) == 1 and groups[-1][0].group == cache.group:
            groups[-1].append(cache)
        else:
            groups.append([cache])
    return groups


def _decline(group: list[WrittenCache], writes: Mapping[Node, Node], index: int, facts: GraphFacts) -> DeclinedSite:
    sources = tuple(cache.source for cache in group)
    readers = [
        reader
        for cache in group
        for reader in _readers(cache, facts)
        if facts.order[reader] > facts.order[writes[cache.source]]
    ]
    if not readers:
        met, first = "no attention of this graph reads the cache", group[0].rows
    else:
        first = min(readers, key=facts.order.__getitem__)
        met = f"cache read by {operation(first)}, which is no known form of attention"
    return DeclinedSite(index, first, None, sources, Reason.UNKNOWN_ATTENTION, met)


def _readers(cache: WrittenCache, facts: GraphFacts) -> list[Node]:
    """What reads a cache's data, behind views and casts."""
    found, pending, seen = [], list(facts.aliases(cache.rows)), set()
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        for reader in node.users:
            if operation(reader) in METADATA or operation(reader) == "output" or node in mutated_by(reader):
                continue
            if fold(reader).chain and reader.args[0] is node:
                pending.append(reader)
            else:
                found.append(reader)
    return found
