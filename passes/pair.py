"""Bringing together what belongs to one pair of caches: one plane arena or append buffer serves all attention over it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch.fx import Node

from alignedkv_compile.reasons import Reason

from .caches import KINDS
from .caches.kind import CachePair
from .facts import GraphFacts
from .nodes import Declined
from .records import AttentionSite, DeclinedSite, Findings, Pairing


def pair_caches(findings: Findings, facts: GraphFacts) -> Pairing:
    """Group sites by their caches; decline groups that do not fit together."""
    declined = list(findings.declined)
    pairs: list[CachePair] = []
    untouched: list[AttentionSite] = []
    for kind in KINDS:
        for sites in _groups([site for site in findings.sites if site.kind is kind], declined):
            try:
                pair = kind.pair(sites, facts)
            except Declined as refusal:
                declined.extend(_decline(sites, refusal.reason, str(refusal)))
                continue
            if pair is None:
                untouched.extend(sites)
            else:
                pairs.append(pair)
    return Pairing(tuple(pairs), tuple(untouched), tuple(declined))


def _groups(sites: Iterable[AttentionSite], declined: list[DeclinedSite]) -> list[Sequence[AttentionSite]]:
    """Sites by their (K, V); a K with two different V, or the other way round, is declined."""
    groups: dict[tuple[Node, Node], list[AttentionSite]] = {}
    for site in sites:
        groups.setdefault((site.key.source, site.value.source), []).append(site)
    consistent: list[Sequence[AttentionSite]] = []
    for pair, members in groups.items():
        if any(other != pair and set(other) & set(pair) for other in groups):
            met = "the K cache is paired with two different V caches, or V with two K"
            declined.extend(_decline(members, Reason.MIXED_CACHES, met))
        else:
            consistent.append(members)
    return consistent


def _decline(sites: Iterable[AttentionSite], reason: Reason, met: str) -> list[DeclinedSite]:
    return [
        DeclinedSite(site.index, site.attention, site.query, (site.key.source, site.value.source), reason, met)
        for site in sites
    ]
