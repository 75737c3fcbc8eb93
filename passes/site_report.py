"""Turning records, which hold graph nodes, into the plain lines of the report."""

from __future__ import annotations

import logging
import re

from torch.fx import Node

from alignedkv_compile.break_even import LEAST_CONTEXT, NEVER
from alignedkv_compile.contract import Outcome, SiteReport

from .nodes import fake, is_symbolic, tensor_of
from .records import AttentionSite, DeclinedSite, Pairing
from .worth import AlignmentOptions, break_even, least_context, least_context_of_planes, most_query_rows, options_for

log = logging.getLogger("alignedkv_compile.passes")

_SYMBOL = re.compile(r"\bs\d+\b")
"""Each layer's cache has a size symbol of its own; the report calls them all ``n``, so that equal layers read alike."""


def report_sites(pairing: Pairing, options: AlignmentOptions) -> tuple[SiteReport, ...]:
    """One line per cached attention call, in graph order; each is logged at DEBUG."""
    lines = [_site_line(site, options) for site in pairing.sites] + [_declined_line(site) for site in pairing.declined]
    lines.sort(key=lambda line: line.index)
    for line in lines:
        log.debug("%s %s (%s, %s): %s", line.name, line.where, line.shape, line.outcome.value, line.reason or "aligned read")
    return tuple(lines)


def _site_line(site: AttentionSite, options: AlignmentOptions) -> SiteReport:
    return SiteReport(
        index=site.index,
        outcome=site.outcome,
        name=site.attention.name,
        where=_where(site.attention),
        cache=(site.key.source.name, site.value.source.name),
        shape=f"query {_shape(site.query)}, cache {_shape(site.key.rows)}",
        reason=_kept(site, options) if site.outcome is Outcome.PREFILL else _streamed(site, options),
    )


def _kept(site: AttentionSite, options: AlignmentOptions) -> str:
    """Why a site keeps stock attention."""
    most = most_query_rows(site, options)
    if is_symbolic(fake(site.query).shape[-2]):
        why = "the number of query rows varies"
    elif site.query_rows <= most:
        why = "a prompt, which attends to itself alone"
    else:
        why = f"{site.query_rows} query rows are more than {most}"
    return f"{why}: stock attention"


def _streamed(site: AttentionSite, options: AlignmentOptions) -> str:
    """For which contexts a rewritten site reads every bit, where the options, the machine or the cache decide that."""
    if options.tolerance == 0:
        return ""
    if options_for(site, options).tolerance > 0:
        least, usual = least_context(site, options), LEAST_CONTEXT if fake(site.key.rows).device.type == "cpu" else 0
        if least == NEVER:
            return f"every bit: fewer are never faster here for {site.query_rows} query rows (min_context)"
        parts = (
            [f"every bit below {least} live rows, from where on fewer are faster here (min_context)"] if least > usual else []
        )
        if share := break_even(site, options):
            parts.append(f"a head that needs more than {share:.0%} of its bytes reads every bit in most calls")
        return "; ".join(parts)
    if options.memory != "beside":
        return "every bit: memory='planes' keeps none beside this cache (alignedkv_compile.Cache is made of them)"
    least = least_context_of_planes(site, options)
    gain = "fewer are never faster here" if least == NEVER else f"fewer are faster from {least} rows on, which it never holds"
    return f"every bit: {gain} (min_context)"


def _declined_line(site: DeclinedSite) -> SiteReport:
    shapes = [f"query {_shape(site.query)}"] if site.query is not None else []
    shapes += [f"cache {_shape(cache)}" for cache in site.caches[:1]]
    return SiteReport(
        index=site.index,
        outcome=Outcome.DECLINED,
        name=site.node.name,
        where=_where(site.node),
        cache=tuple(cache.name for cache in site.caches),
        shape=", ".join(shapes),
        reason=site.met,
        kind=site.reason,
    )


def _shape(node: object) -> str:
    tensor = tensor_of(node)
    return "?" if tensor is None else "[" + ", ".join(_SYMBOL.sub("n", str(size)) for size in tensor.shape) + "]"


def _where(node: Node) -> str:
    """``model.layers.0.self_attn`` when Dynamo knows the module, else the last source line, else nothing."""
    modules = node.meta.get("nn_module_stack")
    if modules:
        path = str(list(modules.values())[-1][0])
        return (
            path.replace("L['self'].", "")
            .replace("L['self']", "")
            .replace("._modules", "")
            .replace("['", ".")
            .replace("']", "")
        )
    lines = [line.strip() for line in str(node.meta.get("stack_trace") or "").splitlines() if line.strip().startswith("File ")]
    return lines[-1] if lines else ""
