"""What the state of caches takes in memory, read when somebody asks: no call counts anything for it.

Each store says what it holds as :class:`CacheUsage` records; :func:`add_source` takes stores that stand elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class CacheUsage:
    """Memory and rows of one pair of caches: K and V of one layer.

    Attributes:
        kind: what is kept for it: "static", "dynamic", "window", "latent", "latent_dynamic", the name of a packed cache's
            storage, or what a further source says.
        address: of its first tensor; records of one address are about one cache.
        cache_bytes: of K and V themselves, room that is not used included.
        plane_bytes: of their planes.
        copy_bytes: of rows that are kept once more beside them.
        rows: live rows of one head and batch entry; None when that is not known.
        capacity: rows that there is room for.
    """

    kind: str
    address: int
    cache_bytes: int
    plane_bytes: int
    copy_bytes: int
    rows: int | None
    capacity: int


class UsageSource(Protocol):
    """Whatever holds caches, or planes of them."""

    def usage(self) -> Iterable[CacheUsage]:
        """One record for each pair of caches, as they are now. Called from any thread, also while calls are under way."""


_SOURCES: list[UsageSource] = []


def add_source(source: UsageSource) -> None:
    """Have :func:`cache_usage` ask ``source`` too, for as long as the process lives."""
    _SOURCES.append(source)


def cache_usage() -> Iterator[CacheUsage]:
    """The records of all sources."""
    for source in tuple(_SOURCES):
        yield from source.usage()
