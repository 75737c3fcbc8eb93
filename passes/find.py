"""Finding every attention call over a cache, and every reason why one stays as it is.

Finders read the graph and add no nodes; where a length is symbolic they decide by a guard, as Dynamo itself would.
"""

from __future__ import annotations

from torch.fx import Node

from .attention import check_certifiable, parse_call
from .facts import GraphFacts
from .find_dynamic import CROPPED, dynamic_site, is_append
from .find_static import ROLLED, static_site, written_cache
from .find_unread import unread_caches
from .nodes import ATTENTION, Declined, fake, operation, tensor_of
from .records import AttentionCall, AttentionSite, DeclinedSite, Findings
from .views import Fold, fold

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
    for node in facts.graph.nodes:
        if operation(node) != ATTENTION:
            continue
        call = parse_call(node)
        if tensor_of(call.key) is None or tensor_of(call.value) is None:
            continue
        key, value = fold(call.key), fold(call.value)  # type: ignore[arg-type]
        index = len(sites) + len(declined)
        try:
            site = _site(call, key, value, index, facts)
            if certified and site is not None:
                check_certifiable(site.key.source)
        except Declined as refusal:
            caches = tuple(cache for folded in (key, value) if (cache := _cache_behind(folded.base, facts)) is not None)
            declined.append(DeclinedSite(index, node, caches, str(refusal)))
        else:
            if site is not None:
                sites.append(site)
    claimed = {operand.source for site in sites for operand in (site.key, site.value)}
    claimed |= {cache for entry in declined for cache in entry.caches}
    unread = unread_caches(facts, claimed, first_index=len(sites) + len(declined))
    return Findings(tuple(sites), (*declined, *unread))


def _site(call: AttentionCall, key: Fold, value: Fold, index: int, facts: GraphFacts) -> AttentionSite | None:
    """The site of one call, or None when it reads no cache at all."""
    appends = [is_append(folded.base, facts) for folded in (key, value)]
    writes = [written_cache(folded.base, facts) for folded in (key, value)]
    if all(appends):
        return dynamic_site(call, key, value, index, facts)
    if all(writes):
        return static_site(call, key, value, index, facts)
    if not any(appends) and not any(writes) and all(_is_cache_input(folded.base) for folded in (key, value)):
        raise Declined("read-only cache (cross-attention) is not supported yet")
    for folded, known in zip((key, value), zip(appends, writes, strict=True), strict=True):
        cache = None if any(known) else _cache_behind(folded.base, facts)
        if cache is not None and not _is_cache_input(folded.base):
            raise Declined(_detour(folded.base, cache, facts))
    if any(appends) or any(writes):
        name = "K" if appends[0] or writes[0] else "V"
        raise Declined(f"only {name} comes from a cache that this graph writes")
    return None


def _is_cache_input(node: Node) -> bool:
    tensor = tensor_of(node)
    return operation(node) == "placeholder" and tensor is not None and tensor.dim() == 4 and tensor.is_floating_point()


def _cache_behind(node: Node, facts: GraphFacts, depth: int = 4) -> Node | None:
    """The cache that a tensor is made of by moving data around, or None; caches that this graph writes or returns count."""
    if _is_cache_input(node):
        return node
    if written_cache(node, facts) is not None:
        return written_cache(node, facts)
    if depth == 0 or (operation(node) not in _MOVES and not fold(node).chain):
        return None
    for source in (fold(node).base,) if fold(node).chain else node.all_input_nodes:
        cache = _cache_behind(source, facts, depth - 1)
        if cache is not None and (facts.writers(cache) or facts.is_returned(node)):
            return cache
    return None


def _detour(base: Node, cache: Node, facts: GraphFacts) -> str:
    written_by = {operation(writer) for writer in facts.writers(cache)}
    if "copy_" in written_by or operation(base) == "roll":
        return ROLLED
    if facts.writers(base) and not facts.shares_storage(base, cache):
        return f"the cache is also written by {operation(facts.writers(base)[-1])}"
    if fake(base).dim() == 4 and facts.is_returned(base) and base not in facts.outputs:
        return CROPPED
    return f"the cache reaches attention through {operation(base)}, which is not folded"
