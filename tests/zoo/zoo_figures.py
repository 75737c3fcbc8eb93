"""What all results together say: counts per kind of cache, and the reasons for which sites stay as they are."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from zoo_results import ClassResult, Run, Verdict

_NUMBER = re.compile(r"\b\d+\b")
_FOLDERS = re.compile(r"(?<![\w.])/[\w./+-]*/")
LONGEST = 160


class Status(StrEnum):
    """What became of a class with one kind of cache, over all dtypes and tolerances."""

    WRONG = "wrong"
    ERROR = "error"
    EVERY = "every site"
    SOME = "some sites"
    NONE = "no site"
    NO_ATTENTION = "no cached attention"
    NOT_ON_STOCK = "not on stock"

    @property
    def on_stock(self) -> bool:
        """Whether the class runs without us."""
        return self is not Status.NOT_ON_STOCK


@dataclass(frozen=True)
class KindFigures:
    """Numbers of classes for one kind of cache.

    Attributes:
        kind: of cache.
        on_stock: classes that run without us.
        wrong, errors: of these, classes with a wrong result or an exception in any combination.
        attention: of these, classes with attention over a KV cache.
        every: of these, classes with every cached attention call rewritten and no cache unseen.
        some: classes with at least one call rewritten, but not every one.
        unseen: classes with a cache that no line of a report speaks of.
    """

    kind: str
    on_stock: int
    wrong: int
    errors: int
    attention: int
    every: int
    some: int
    unseen: int

    @property
    def share(self) -> float:
        """``every`` of the classes with attention over a KV cache."""
        return self.every / self.attention if self.attention else 0.0


@dataclass(frozen=True)
class Reason:
    """Why sites were declined: in how many classes, for each kind of cache, and three of them."""

    text: str
    classes: dict[str, int]
    examples: tuple[str, ...]


def status(result: ClassResult, kind: str) -> Status:
    """What became of one class."""
    runs = [run for run in result.of_cache(kind) if run.ran_on_stock]
    if not runs:
        return Status.NOT_ON_STOCK
    for verdict, found in ((Verdict.WRONG, Status.WRONG), (Verdict.ERROR, Status.ERROR)):
        if any(run.verdict is verdict for run in runs):
            return found
    if not any(run.sites or run.unseen for run in runs):
        return Status.NO_ATTENTION
    if all(run.every_site_rewritten for run in runs):
        return Status.EVERY
    return Status.SOME if any(run.count("rewritten") for run in runs) else Status.NONE


def figures(results: Sequence[ClassResult], kind: str) -> KindFigures:
    """Counts for one kind of cache."""
    each = [status(result, kind) for result in results]
    return KindFigures(
        kind=kind,
        on_stock=sum(one.on_stock for one in each),
        wrong=each.count(Status.WRONG),
        errors=each.count(Status.ERROR),
        attention=sum(one.on_stock and one is not Status.NO_ATTENTION for one in each),
        every=each.count(Status.EVERY),
        some=each.count(Status.SOME),
        unseen=sum(any(run.ran_on_stock and run.unseen for run in result.of_cache(kind)) for result in results),
    )


def reasons(results: Iterable[ClassResult], kinds: Sequence[str]) -> tuple[Reason, ...]:
    """Every reason of a site that was not rewritten, the most frequent first."""
    found: dict[str, dict[str, set[str]]] = defaultdict(lambda: {kind: set() for kind in kinds})
    for result in results:
        for kind in kinds:
            for text in reasons_of(result.of_cache(kind)):
                found[text][kind].add(result.name)
    listed = [
        Reason(text, {kind: len(names) for kind, names in by.items()}, tuple(sorted(set().union(*by.values()))[:3]))
        for text, by in found.items()
    ]
    return tuple(sorted(listed, key=lambda reason: (-max(reason.classes.values()), reason.text)))


def reasons_of(runs: Iterable[Run]) -> tuple[str, ...]:
    """The reasons of some runs, sorted; numbers in them are left out, so that equal cases read alike."""
    texts = {_NUMBER.sub("N", site.reason) for run in runs if run.ran_on_stock for site in run.sites if site.reason}
    return tuple(sorted(texts))


def failures(results: Iterable[ClassResult], verdict: Verdict) -> tuple[tuple[str, str], ...]:
    """Every combination with a verdict: which, and its message; combinations with one message are one line."""
    found: dict[tuple[str, str], list[str]] = {}
    for result in results:
        for run in result.runs:
            if run.verdict is verdict:
                found.setdefault((result.name, _message(run)), []).append(str(run.combination))
    lines = []
    for (name, message), combinations in found.items():
        kinds = {each.split(",")[0] for each in combinations}
        which = f", {kinds.pop()}" if len(kinds) == 1 else ""
        if verdict is not Verdict.NOT_ON_STOCK and len(combinations) == 1:
            which = f", {combinations[0]}"
        lines.append((f"{name}{which}", message))
    return tuple(lines)


def _message(run: Run) -> str:
    if run.verdict is Verdict.WRONG:
        return f"{run.error_in}: the error is {run.error:.2g} times its limit"
    text = _FOLDERS.sub("", run.message)
    return text if len(text) <= LONGEST else text[:LONGEST].rstrip() + " ..."
