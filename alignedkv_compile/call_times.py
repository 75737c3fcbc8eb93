"""How long calls of compiled graphs take, for whoever asks; with nobody asking, a call does not look at the clock."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class TimedGraph:
    """What is known of a call's graph.

    Attributes:
        graph: name of the graph's counters, see ``counter_ledger.GraphKey``.
        phase: "decode" where a cache is read aligned, else "prefill".
    """

    graph: str
    phase: str


Observer = Callable[[TimedGraph, float], None]
"""Takes the wall-clock seconds of one call, from binding the caches to the outputs. On a GPU a call ends when its kernels are
launched, unless it waits for something itself. An observer is called by the thread that decodes, after every call, and must
be quick."""


class CallTimes:
    """The observers of all calls.

    Attributes:
        observers: replaced as a whole, never changed.
    """

    def __init__(self) -> None:
        self.observers: tuple[Observer, ...] = ()
        self._lock = threading.Lock()

    def add(self, observer: Observer) -> None:
        """Call ``observer`` after every call from now on."""
        with self._lock:
            self.observers = (*self.observers, observer)

    def remove(self, observer: Observer) -> None:
        """Undo one :meth:`add`; nothing happens when there was none."""
        with self._lock:
            remaining = list(self.observers)
            if observer in remaining:
                remaining.remove(observer)
            self.observers = tuple(remaining)


CALL_TIMES = CallTimes()
"""The process's."""
