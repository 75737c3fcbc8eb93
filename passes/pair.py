"""Bringing together what belongs to one pair of caches: one plane arena or append buffer serves all attention over it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch.fx import Node

from .facts import GraphFacts
from .find_dynamic import attention_readers
from .find_static import write_pairs
from .nodes import Declined, fake
from .records import AppendPair, AttentionSite, CacheKind, DeclinedSite, Findings, Outcome, Pairing, StaticPair

_Endpoints = Callable[[AttentionSite], tuple[Node, Node]]


def pair_caches(findings: Findings, facts: GraphFacts) -> Pairing:
    """Group sites by their caches; decline groups that do not fit together."""
    declined = list(findings.declined)
    static_sites = [site for site in findings.sites if site.kind is CacheKind.STATIC]
    append_sites = [site for site in findings.sites if site.kind is CacheKind.DYNAMIC and site.outcome is Outcome.REWRITTEN]
    static = [
        StaticPair(key, value, write_pairs(key, value, facts), sites)
        for (key, value), sites in _groups(static_sites, lambda site: (site.key.source, site.value.source), declined)
    ]
    append = []
    for _, sites in _groups(append_sites, lambda site: (site.key.write, site.value.write), declined):
        try:
            append.append(_append_pair(sites))
        except Declined as refusal:
            declined.extend(_decline(sites, str(refusal)))
    untouched = [site for site in findings.sites if site.kind is CacheKind.DYNAMIC and site.outcome is Outcome.PREFILL]
    return Pairing(tuple(static), tuple(append), tuple(untouched), tuple(declined))


def _groups(
    sites: Iterable[AttentionSite], endpoints: _Endpoints, declined: list[DeclinedSite]
) -> list[tuple[tuple[Node, Node], tuple[AttentionSite, ...]]]:
    """Sites by their (K, V); a K with two different V, or the other way round, is declined."""
    groups: dict[tuple[Node, Node], list[AttentionSite]] = {}
    for site in sites:
        groups.setdefault(endpoints(site), []).append(site)
    consistent = []
    for pair, members in groups.items():
        if any(other != pair and set(other) & set(pair) for other in groups):
            declined.extend(_decline(members, "the K cache is paired with two different V caches, or V with two K"))
        else:
            consistent.append((pair, tuple(members)))
    return consistent


def _decline(sites: Iterable[AttentionSite], reason: str) -> list[DeclinedSite]:
    return [DeclinedSite(site.index, site.attention, (site.key.source, site.value.source), reason) for site in sites]


def _append_pair(sites: tuple[AttentionSite, ...]) -> AppendPair:
    first = sites[0]
    rewritten = {site.attention for site in sites}
    for operand, name in ((first.key, "K"), (first.value, "V")):
        if not set(attention_readers(operand, name)) <= rewritten:
            raise Declined("another attention call over the same cache is not rewritten")
    return AppendPair(
        key=first.key.source,
        value=first.value.source,
        key_result=first.key.write,
        value_result=first.value.write,
        new_key=first.key.new_rows,
        new_value=first.value.new_rows,
        new_rows=int(fake(first.key.new_rows).shape[2]),
        sites=sites,
    )
