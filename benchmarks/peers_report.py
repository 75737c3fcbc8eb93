"""What the benchmark of peers found, as tables: milliseconds and error by context, fitted lines, and where ours is faster."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from rich import box
from rich.table import Table

from alignedkv_compile.plots.fit import Line, break_even, fit_line
from attention_report import Measured
from attention_variants import ALIGNED, STREAM

OURS = (ALIGNED, STREAM)
NOTHING = "-"


@dataclass(frozen=True)
class PeersCase:
    """All peers on one shape and context.

    Attributes:
        shape, context, dtype: of the layer.
        effective_keys: exp(entropy of the weights), mean over heads.
        skipped: why nothing was run, or "".
        variants: what was measured, by peer.
        copies: copies of the layer that each of them went round.
        refused: why there is no figure, by peer.
    """

    shape: str
    context: int
    dtype: str
    effective_keys: float = 0.0
    skipped: str = ""
    variants: dict[str, Measured] = field(default_factory=dict)
    copies: dict[str, int] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """One peer on one shape, over all contexts.

    Attributes:
        peer: its name.
        cells: median milliseconds at each context, "-" where there is none.
        share: bytes that a call reads over those of K and V in the layer's dtype, at the longest context measured; "" without.
        error: the largest relative error of all contexts, "" without.
        line: ms = slope x tokens + intercept, "" with fewer than two contexts.
        faster: for each of :data:`OURS`, where it is faster by these lines.
        refused: the first reason why a cell is empty, "" when none is.
    """

    peer: str
    cells: tuple[str, ...]
    share: str
    error: str
    line: str
    faster: tuple[str, ...]
    refused: str


def where_faster(line: Line, other: Line) -> str:
    """At which contexts ``line`` is below ``other``; a context beyond those measured is an extrapolation."""
    start, end = break_even(line, other), break_even(other, line)
    if start == 0.0:
        return "everywhere"
    if start is not None:
        return f"from {start:.0f}"
    return "nowhere" if end is None or end == 0.0 else f"up to {end:.0f}"


def rows_of(cases: Sequence[PeersCase], peers: Sequence[str]) -> list[Row]:
    """A row for each peer.

    Args:
        cases: of one shape and dtype, by context.
        peers: names, in the order of the table.
    """
    found = {name: {case.context: case.variants[name] for case in cases if name in case.variants} for name in peers}
    lines = {name: fit_line(tuple(by), tuple(one.median_ms for one in by.values())) for name, by in found.items() if by}
    rows = []
    for name in peers:
        by, line = found[name], lines.get(name)
        reasons = [case.refused.get(name) or case.skipped for case in cases if name not in case.variants]
        rows.append(
            Row(
                peer=name,
                cells=tuple(f"{by[case.context].median_ms:.3f}" if case.context in by else NOTHING for case in cases),
                share=f"{by[max(by)].bytes_fraction:.2f}" if by else "",
                error=f"{max(one.relative_error for one in by.values()):.1e}" if by else "",
                line=str(line) if line is not None else "",
                faster=tuple(_against(ours, name, lines) for ours in OURS),
                refused=next((reason for reason in reasons if reason), ""),
            )
        )
    return rows


def _against(ours: str, name: str, lines: Mapping[str, Line | None]) -> str:
    line, other = lines.get(ours), lines.get(name)
    return where_faster(line, other) if ours != name and line is not None and other is not None else ""


def by_shape(cases: Sequence[PeersCase]) -> Iterator[tuple[str, list[PeersCase]]]:
    """Title and cases of each shape and dtype, cases by context."""
    for shape, dtype in dict.fromkeys((case.shape, case.dtype) for case in cases):
        chosen = [case for case in cases if (case.shape, case.dtype) == (shape, dtype)]
        yield f"{shape} {dtype}", sorted(chosen, key=lambda case: case.context)


def tables(cases: Sequence[PeersCase], peers: Sequence[str]) -> Iterator[Table]:
    """For each shape: times, then lines. Rows without a figure say why."""
    for title, chosen in by_shape(cases):
        times = Table(title=f"{title}: median ms of a decode step, by tokens in the cache", box=box.SIMPLE_HEAD)
        times.add_column("peer", no_wrap=True)
        for name in (*(str(case.context) for case in chosen), "bytes", "error"):
            times.add_column(name, justify="right", no_wrap=True)
        lines = Table("peer", "ms", *(f"{ours} is faster" for ours in OURS), title=f"{title}: lines", box=box.SIMPLE_HEAD)
        for row in rows_of(chosen, peers):
            times.add_row(row.peer, *row.cells, row.share, row.error)
            if row.line or row.refused:
                lines.add_row(row.peer, row.line or row.refused, *row.faster)
        yield times
        yield lines


def markdown(cases: Sequence[PeersCase], descriptions: Mapping[str, str], machine: str) -> str:
    """The same as a page: a table for each shape, the reasons of rows without figures, and what each peer is."""
    parts = [f"Decode attention on CPUs: {machine}.", ""]
    for title, chosen in by_shape(cases):
        contexts = [str(case.context) for case in chosen]
        columns = ["peer", *contexts, "bytes", "error", "ms", *(f"{ours} is faster" for ours in OURS)]
        parts += [f"### {title}", "", _line(columns), _line(["---"] * len(columns))]
        found = rows_of(chosen, list(descriptions))
        parts += [_line([row.peer, *row.cells, row.share, row.error, row.line, *row.faster]) for row in found]
        parts += ["", *(f"- {row.peer}: {row.refused}" for row in found if row.refused), ""]
    parts += [f"- **{name}**: {description}" for name, description in descriptions.items()]
    return "\n".join(parts) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"
