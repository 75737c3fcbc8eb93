"""The counters of every graph since the last reset, of those that are gone too: sums that never fall, as a time series must be.

Nothing is done in a call: a graph's counters are tensors that its kernels add to, and this keeps a hold of them.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

Owner = TypeVar("Owner")


@dataclass(frozen=True)
class GraphKey:
    """Graphs of one function with equally many attention sites are one: recompiles of the same model.

    Attributes:
        function: what the graph was traced from, "" when Dynamo did not say.
        sites: its attention sites.
    """

    function: str
    sites: int

    def __str__(self) -> str:
        return f"{self.function or 'graph'}/{self.sites}"


@dataclass(frozen=True)
class _Entry(Generic[Owner]):
    owner: weakref.ReferenceType[Owner]
    key: GraphKey
    counters: torch.Tensor


class CounterLedger(Generic[Owner]):
    """Counters by :class:`GraphKey`; a graph's own go into a sum when they are first read after its death."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries: list[_Entry[Owner]] = []
        self._retired: dict[GraphKey, torch.Tensor] = {}

    def open(self, owner: Owner, key: GraphKey, counters: torch.Tensor) -> None:
        """Follow ``counters``, int64 ``[sites, fields]``, which ``owner`` writes for as long as it lives."""
        with self._lock:
            self._entries.append(_Entry(weakref.ref(owner), key, counters))

    def totals(self) -> dict[GraphKey, list[list[int]]]:
        """Sums of all counters, ``[sites][fields]``; waits for the device that they are on."""
        with self._lock:
            alive = [(entry, entry.owner() is not None) for entry in self._entries]  # asked first: the dead write no more
            sums = dict(self._retired)
            for entry, lives in alive:
                counters = entry.counters.cpu()
                sums[entry.key] = sums[entry.key] + counters if entry.key in sums else counters.clone()
                if not lives:
                    before = self._retired.get(entry.key)
                    self._retired[entry.key] = counters.clone() if before is None else before + counters
            self._entries = [entry for entry, lives in alive if lives]
        return {key: total.tolist() for key, total in sums.items()}

    def owners(self) -> Iterator[tuple[GraphKey, Owner]]:
        """The graphs that are alive."""
        for entry in tuple(self._entries):
            owner = entry.owner()
            if owner is not None:
                yield entry.key, owner

    def reset(self) -> None:
        """Forget what the dead have counted; the living set their counters to zero themselves."""
        with self._lock:
            self._entries = [entry for entry in self._entries if entry.owner() is not None]
            self._retired.clear()
