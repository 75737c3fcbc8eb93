"""Finding every attention call over a cache, and every reason why one stays as it is.

Finders read the graph and add no nodes; where a length is symbolic they decide by a guard, as Dynamo itself would.
"""

from __future__ import annotations

from torch.fx import Node

from alignedkv_compile.reasons import Reason

from .attention import check_certifiable
from .caches import KINDS
from .caches.kind import CandidateCall
from .facts import GraphFacts
from .nodes import Declined, fake, operation, same, tensor_of
from .records import AttentionSite, DeclinedSite, Findings
from .unread import unread_caches
from .views import fold

_MOVES = frozenset(
    [
        "roll",
        "chunk",
        "split",
        "cat",
        "concat",
        "concatenate",
        "index_select",
        "getitem",
        "narrow",
        "where",
        "masked_fill",
        "clone",
        "slice_scatter",
        "gather",
    ]
)
"""Operations that a cache may pass through on its way to attention, though no rewrite folds them."""


def find_sites(facts: GraphFacts, *, certified: bool) -> Findings:
    """Every cached attention call of a graph, in graph order, with caches that no such call reads last.

    Args:
        certified: calls that cannot become certified reads are declined.
    """
    sites: list[AttentionSite] = []
    declined: list[DeclinedSite] = []
    for call in facts.calls:
        if tensor_of(call.key) is None or tensor_of(call.value) is None:
            continue
        key, value = fold(call.key, call.key_axes), fold(call.value, call.value_axes)  # type: ignore[arg-type]
        candidate = CandidateCall(call, key, value, len(sites) + len(declined))
        try:
            site = _site(candidate, facts)
            if certified and site is not None:
                check_certifiable(site)
        except Declined as refusal:
            bases = (candidate.key.base, candidate.value.base)
            caches = refusal.caches or tuple(cache for base in bases if (cache := _cache_behind(base, facts)) is not None)
            declined.append(DeclinedSite(candidate.index, call.node, call.query, caches, refusal.reason, str(refusal)))
        else:
            if site is not None:
                sites.append(site)
    claimed = {operand.source for site in sites for operand in (site.key, site.value)}
    claimed |= {cache for entry in declined for cache in entry.caches}
    unread = unread_caches(facts, claimed, first_index=len(sites) + len(declined))
    return Findings(tuple(sites), (*declined, *unread))


def _site(candidate: CandidateCall, facts: GraphFacts) -> AttentionSite | None:
    """The site of one call, or None when it reads no cache at all."""
    bases = (candidate.key.base, candidate.value.base)
    kinds = [next((kind for kind in KINDS if kind.claims(base, facts)), None) for base in bases]
    if kinds[0] is not None and kinds[0] is kinds[1]:
        if not facts.inference_only:
            raise Declined(Reason.GRADIENTS, "an input requires grad while grad mode is on: the backend is for inference only")
        if candidate.call.refusal:
            raise Declined(Reason.WEIGHTS_READ, candidate.call.refusal)
        _check_unchanged(candidate, facts)
        return kinds[0].site(candidate, facts)
    for base, kind in zip(bases, kinds, strict=True):
        cache = None if kind is not None else _cache_behind(base, facts)
        if cache is not None and not facts.is_cache_input(base):
            raise Declined(Reason.REARRANGED, _detour(base, cache, facts))
    if kinds != [None, None] and any(facts.writers(base) or facts.is_returned(base) for base in bases):
        raise Declined(Reason.MIXED_CACHES, "K and V come from different kinds of cache, or one of them from none")
    return None


def _check_unchanged(candidate: CandidateCall, facts: GraphFacts) -> None:
    """Refuse a written-out attention whose operands change on its way: the read that replaces it reads them at its end.

    Raises:
        Declined: naming the operand.
    """
    call = candidate.call
    for operand in (candidate.key.base, *call.operands):
        if isinstance(operand, Node) and facts.written_between(operand, call.scores, call.node):
            raise Declined(Reason.WRITE_ORDER, f"{operand.name} is written between the scores and the output of the attention")
    if facts.written_between(candidate.value.base, call.value_reader, call.node):
        raise Declined(Reason.WRITE_ORDER, f"{candidate.value.base.name} is written between the attention and its sinks")


def _cache_behind(node: Node, facts: GraphFacts, depth: int = 4) -> Node | None:
    """The cache that a tensor is made of by moving data around, or None; caches that this graph writes or returns count."""
    for alias in facts.aliases(node) if tensor_of(node) is not None else ():
        if facts.is_cache_input(alias) and fake(node).dim() == 4 and all(map(same, fake(node).shape, fake(alias).shape)):
            return alias
    if depth == 0 or (operation(node) not in _MOVES and not fold(node).chain):
        return None
    for source in (fold(node).base,) if fold(node).chain else node.all_input_nodes:
        cache = _cache_behind(source, facts, depth - 1)
        if cache is not None and (facts.writers(cache) or facts.is_returned(node)):
            return cache
    return None


def _detour(base: Node, cache: Node, facts: GraphFacts) -> str:
    if facts.writers(base) and not facts.shares_storage(base, cache):
        return f"the cache is also written by {operation(facts.writers(base)[-1])}"
    return f"the cache reaches attention through {operation(base)}, which is not folded"
