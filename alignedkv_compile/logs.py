"""Logging: ``TORCH_LOGS="+alignedkv_compile"`` shows what the backend decided and why.

torch takes the name of any importable package in ``TORCH_LOGS`` and gives the loggers of its modules a handler, so that plain
:mod:`logging` is all that is needed; without ``TORCH_LOGS``, warnings reach stderr and the rest is dropped. ``TORCH_TRACE``
also gets the rewritten graphs.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch.fx

from . import torch_private
from .contract import Outcome, SiteReport

_log = logging.getLogger(__name__)


def describe_site(site: SiteReport) -> str:
    """One line: which attention call, over which cache, and what became of it."""
    place = f" at {site.where}" if site.where else ""
    kind = f" [{site.kind.value}]" if site.kind is not None else ""
    reason = f": {site.reason}{kind}" if site.reason else ""
    return f"{site.name}{place} over {', '.join(site.cache) or 'no cache'} {site.shape} {site.outcome.value}{reason}"


def log_sites(graph: str, sites: Iterable[SiteReport]) -> None:
    """Log every decision about a graph: declined sites at INFO, the others at DEBUG."""
    for site in sites:
        level = logging.INFO if site.outcome is Outcome.DECLINED else logging.DEBUG
        _log.log(level, "%s: site %d: %s", graph, site.index, describe_site(site))


def log_rewritten(graph: str, module: torch.fx.GraphModule) -> None:
    """Log the rewritten graph at DEBUG, and add it to the structured trace."""
    if _log.isEnabledFor(logging.DEBUG):
        _log.debug("%s: rewritten graph\n%s", graph, module.print_readable(print_output=False))
    torch_private.write_trace_artifact("alignedkv_rewritten_graph", lambda: module.print_readable(print_output=False))
