"""What the backend did with each compiled graph: sites found, rewritten, declined (and why), and notes from run time.

The process keeps one plain :class:`GraphReport` per graph that went through the backend; :func:`report` snapshots them.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING

from .contract import Outcome, SiteReport
from .reasons import PAGE, Reason

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass
class GraphReport:
    """One compiled graph.

    Attributes:
        name: "graph 0", "graph 1", ... in the order of compilation, and the function that it was traced from.
        sites: one entry per attention call over a KV cache.
        fallback: why the whole graph went to stock Inductor after an internal error, or "".
        declined_cuda_graphs: why the graph is not captured although CUDA graphs were asked for, or "". Inductor may find other
            reasons, which it logs itself.
        notes: what happened at run time (planes left stale, and why), each with the number of times.
        function: what it was traced from, "" when Dynamo did not say.
    """

    name: str
    sites: tuple[SiteReport, ...] = ()
    fallback: str = ""
    declined_cuda_graphs: str = ""
    notes: dict[str, int] = field(default_factory=dict)
    function: str = ""

    def note(self, text: str) -> bool:
        """Count a run-time event; True the first time that it is seen."""
        self.notes[text] = self.notes.get(text, 0) + 1
        return self.notes[text] == 1

    def count(self, outcome: Outcome) -> int:
        """Sites with this outcome."""
        return sum(site.outcome is outcome for site in self.sites)

    def to_dict(self) -> dict[str, object]:
        """Plain data: strings, numbers, lists and dicts only."""
        sites = [
            {
                **asdict(site),
                "outcome": site.outcome.value,
                "cache": list(site.cache),
                "kind": None if site.kind is None else site.kind.value,
            }
            for site in self.sites
        ]
        return {
            "name": self.name,
            "function": self.function,
            "sites": sites,
            "fallback": self.fallback,
            "declined_cuda_graphs": self.declined_cuda_graphs,
            "notes": dict(self.notes),
        }


@dataclass(frozen=True)
class Report:
    """All graphs compiled so far in this process; ``found == rewritten + declined + prefill``.

    Print it, ``rich.print`` it, or take :meth:`to_dict`.
    """

    graphs: tuple[GraphReport, ...]

    @property
    def found(self) -> int:
        """Attention calls over a KV cache."""
        return sum(len(graph.sites) for graph in self.graphs)

    @property
    def rewritten(self) -> int:
        """Calls that became aligned reads."""
        return sum(graph.count(Outcome.REWRITTEN) for graph in self.graphs)

    @property
    def declined(self) -> int:
        """Calls left to stock attention, each with a reason."""
        return sum(graph.count(Outcome.DECLINED) for graph in self.graphs)

    @property
    def prefill(self) -> int:
        """Calls with a long query: stock attention by design."""
        return sum(graph.count(Outcome.PREFILL) for graph in self.graphs)

    @property
    def reasons(self) -> dict[tuple[Reason, str], int]:
        """How often each reason was met, over all graphs, the most frequent first."""
        sites = [site for graph in self.graphs for site in graph.sites if site.kind is not None]
        counts = Counter((site.kind, site.reason) for site in sites if site.kind is not None)
        return dict(counts.most_common())

    def to_dict(self) -> dict[str, object]:
        """Plain data: strings, numbers, lists and dicts only."""
        counts = {name: getattr(self, name) for name in ("found", "rewritten", "declined", "prefill")}
        return {**counts, "graphs": [graph.to_dict() for graph in self.graphs]}

    def __str__(self) -> str:
        if not self.graphs:
            return "alignedkv: no graph has been compiled with backend 'alignedkv' in this process"
        lines = [f"alignedkv: {self._summary()}"]
        for graph in self.graphs:
            lines.append(f"  {graph.name}: {_graph_summary(graph)}")
            lines += [f"    {mark} {text}" for mark, text, _ in _details(graph)]
        lines += [f"  {text}" for text in self._why()]
        return "\n".join(lines)

    def __rich__(self) -> RenderableType:
        from rich.markup import escape
        from rich.text import Text
        from rich.tree import Tree

        if not self.graphs:
            return Text(str(self), style="dim")
        tree = Tree(f"[bold]alignedkv[/]: {self._summary()}")
        for graph in self.graphs:
            branch = tree.add(f"[bold]{escape(graph.name)}[/]: {_graph_summary(graph)}")
            for mark, text, style in _details(graph):
                branch.add(Text(f"{mark} {text}", style=style))
        why = list(self._why())
        if why:
            branch = tree.add(Text(why[0], style="bold"))
            for text in why[1:]:
                branch.add(Text(text.strip(), style="yellow"))
        return tree

    def _why(self) -> Iterator[str]:
        """What was declined over all graphs, and where to read on."""
        if self.reasons:
            yield f"declined, over all graphs ({PAGE} says what each means and what to do):"
        for (kind, met), times in self.reasons.items():
            yield f"  {times} x [{kind.value}] {met}"

    def _summary(self) -> str:
        return (
            f"{self.found} attention calls over a KV cache in {len(self.graphs)} graphs, {self.rewritten} rewritten,"
            f" {self.prefill} prefill, {self.declined} declined"
        )


def _graph_summary(graph: GraphReport) -> str:
    if graph.fallback:
        return "compiled by stock Inductor after an internal error"
    if not graph.sites:
        return "no attention over a KV cache"
    counts = [f"{graph.count(outcome)} {outcome.value}" for outcome in Outcome if graph.count(outcome)]
    return ", ".join(counts)


def _details(graph: GraphReport) -> Iterator[tuple[str, str, str]]:
    """Lines below a graph as (mark, text, style): equal reasons share a line, since layers are mostly alike."""
    if graph.fallback:
        yield "!", graph.fallback, "red"
    if graph.declined_cuda_graphs:
        yield "!", graph.declined_cuda_graphs, "yellow"
    grouped: dict[tuple[Outcome, str, str], list[SiteReport]] = {}
    for site in graph.sites:
        grouped.setdefault((site.outcome, site.shape, site.reason), []).append(site)
    for (outcome, shape, reason), sites in grouped.items():
        style = {Outcome.REWRITTEN: "green", Outcome.PREFILL: "cyan", Outcome.DECLINED: "yellow"}[outcome]
        place = sites[0].where or sites[0].name
        text = f"{len(sites)} x {outcome.value} {shape}".rstrip() + f" (first: {place})" + (f": {reason}" if reason else "")
        text += f" [{sites[0].kind.value}]" if sites[0].kind is not None else ""
        yield {"rewritten": "+", "prefill": ".", "declined": "-"}[outcome.value], text, style
    for text, times in graph.notes.items():
        yield "!", f"{text} ({times} calls of a layer)", "yellow"


class _Registry:
    """The process's graph reports, in the order of compilation."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._graphs: list[GraphReport] = []
        self._compiled = 0

    def open(self, function: str) -> GraphReport:
        """A new report, not yet listed, for a graph traced from ``function``."""
        with self._lock:
            name = f"graph {self._compiled}" + (f" ({function})" if function else "")
            self._compiled += 1
        return GraphReport(name, function=function)

    def add(self, graph: GraphReport) -> None:
        with self._lock:
            self._graphs.append(graph)

    def snapshot(self) -> tuple[GraphReport, ...]:
        with self._lock:
            return tuple(replace(graph, notes=dict(graph.notes)) for graph in self._graphs)

    def clear(self) -> None:
        with self._lock:
            self._graphs.clear()
            self._compiled = 0


REGISTRY = _Registry()


def report() -> Report:
    """What became of every graph compiled with ``backend="alignedkv"`` in this process, since the last :func:`reset_report`."""
    return Report(REGISTRY.snapshot())


def reset_report() -> None:
    """Forget the graphs compiled so far; compiled code goes on running."""
    REGISTRY.clear()
