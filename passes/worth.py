"""Which sites are worth reading with fewer bits, and from which context on: the user's options, asked for one site."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import torch

from alignedkv_compile.break_even import ReadShape
from alignedkv_compile.contract import Outcome

from .nodes import constant, example_size, fake, is_symbolic
from .records import MAX_ALIGNED_QUERY_ROWS, AttentionSite, Findings


class AlignmentOptions(Protocol):
    """What the passes need of :class:`alignedkv_compile.options.Options`."""

    @property
    def tolerance(self) -> float: ...

    @property
    def min_context(self) -> int | None: ...

    def least_context(self, read: ReadShape) -> int: ...

    def break_even(self, read: ReadShape) -> float: ...

    def most_query_rows(self, read: ReadShape) -> int: ...

    @property
    def memory(self) -> str: ...

    @property
    def without_planes(self) -> AlignmentOptions: ...

    @property
    def stats(self) -> bool: ...

    @property
    def certified(self) -> bool: ...

    @property
    def cuda_graphs(self) -> bool: ...

    @property
    def shadow_every(self) -> int: ...

    def unit_roundoff(self, dtype: torch.dtype) -> float: ...


def options_for(site: AttentionSite, options: AlignmentOptions) -> AlignmentOptions:
    """The options of one site: no planes are kept beside a cache where they would not pay, or where the user wants them in its
    place only."""
    read = site.kind.read_shape(site)
    if read is None or options.tolerance == 0:
        return options
    keeps_planes = options.memory == "beside" and read.can_reach(least_context_of_planes(site, options))
    return options if keeps_planes else options.without_planes


def leave_long_queries(findings: Findings, options: AlignmentOptions) -> Findings:
    """The findings with stock attention for queries of more rows than pay."""
    sites = tuple(
        replace(site, outcome=Outcome.PREFILL) if site.query_rows > most_query_rows(site, options) else site
        for site in findings.sites
    )
    return replace(findings, sites=sites)


def most_query_rows(site: AttentionSite, options: AlignmentOptions) -> int:
    """New tokens up to which a site is rewritten."""
    read = site.kind.read_shape(site)
    return MAX_ALIGNED_QUERY_ROWS if read is None else min(MAX_ALIGNED_QUERY_ROWS, options.most_query_rows(read))


def least_context(site: AttentionSite, options: AlignmentOptions) -> int:
    """Live rows below which a site's read takes every bit; where rows have to be decoded for that, fewer bits always pay."""
    read = site.kind.read_shape(site)
    return options.min_context or 0 if read is None else options.least_context(read)


def break_even(site: AttentionSite, options: AlignmentOptions) -> float:
    """The share of a head's bytes beyond which a site's read should take every bit; 0 where that is not known."""
    read = site.kind.read_shape(site)
    return 0.0 if read is None or options.tolerance == 0 or options.certified else options.break_even(read)


def least_context_of_planes(site: AttentionSite, options: AlignmentOptions) -> int:
    """Live rows from which on the planes of a site's cache are read: by single tokens, whatever this graph's query is."""
    return least_context(replace(site, query_rows=1), options)


def read_shape(site: AttentionSite, *, fixed_rows: bool) -> ReadShape:
    """What the time of a read of a site's own K and V depends on.

    Args:
        fixed_rows: whether the cache tensors have all the rows that they will ever have.
    """
    key, value = fake(site.key.source), fake(site.value.source)
    batch, heads, rows = key.shape[:3]
    return ReadShape(
        device=key.device,
        dtype=key.dtype,
        pairs=example_size(batch) * example_size(heads),
        group=query_heads(site) // constant(heads),
        key_dim=constant(key.shape[3]),
        value_dim=constant(value.shape[3]),
        capacity=int(rows) if fixed_rows and not is_symbolic(rows) else None,
        query_rows=site.query_rows,
    )


def query_heads(site: AttentionSite) -> int:
    """``Hq`` of a rewritten site."""
    if site.call.folded:
        return constant(fake(site.key.source).shape[1]) * site.key.repeats.count
    return constant(fake(site.query).shape[1])
