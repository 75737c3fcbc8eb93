"""The screen."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from .view import QUANTILES, LayerLine, View

BAR = 20
"""Characters of a bar that stands for all bytes."""
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def size(number: float) -> str:
    """Bytes for people."""
    power = min(int(math.log2(number) // 10) if number >= 1 else 0, len(_UNITS) - 1)
    return f"{number / 1024**power:.{0 if power == 0 else 1}f} {_UNITS[power]}"


def milliseconds(seconds: float) -> str:
    """Seconds as milliseconds, "-" for none."""
    return "-" if math.isnan(seconds) else f"{seconds * 1000:.3g}"


def render(shown: View, url: str) -> RenderableType:
    """Everything, one block below the other; parts of which nothing is known say what it takes."""
    return Group(*_blocks(shown, url))


def _blocks(shown: View, url: str) -> Iterator[RenderableType]:
    since = "since the process began" if shown.seconds is None else f"in the last {shown.seconds:.1f} s"
    resident = "" if shown.resident_bytes is None else f", process {size(shown.resident_bytes)}"
    yield Text(f"alignedkv {shown.version} at {url}{resident}; counts {since}", style="bold")
    yield Text(f"attention calls: {_counts(shown.sites)}; {shown.compilations} graphs compiled")
    yield Text(f"every bit read: {_counts(shown.streamed)}", style="yellow" if shown.streamed else "dim")
    yield _caches(shown)
    yield _latencies(shown)
    yield _layers(shown)


def _counts(numbers: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(numbers.items())) or "none"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
    return table


def _caches(shown: View) -> RenderableType:
    table = _table("memory", "caches", "K and V pairs", "K and V", "planes", "copies", "rows used")
    for line in shown.caches:
        used = "-" if line.utilisation is None else f"{line.utilisation:.1%}"
        table.add_row(line.kind, str(line.pairs), size(line.cache_bytes), size(line.plane_bytes), size(line.copy_bytes), used)
    return table if shown.caches else Text("no cache is kept", style="dim")


def _latencies(shown: View) -> RenderableType:
    table = _table("calls", "graph", "phase", "calls", "per s", *(f"p{share * 100:g} ms" for share in QUANTILES))
    for line in shown.latencies:
        rate = "-" if line.rate is None else f"{line.rate:.1f}"
        table.add_row(line.graph, line.phase, str(line.calls), rate, *map(milliseconds, line.quantiles))
    return table if shown.latencies else Text("no call has been timed", style="dim")


def _layers(shown: View) -> RenderableType:
    if not shown.layers:
        return Text('no bytes are counted: options={"stats": True}', style="dim")
    fraction = f"{shown.read / shown.full:.1%}" if shown.full else "nothing read"
    title = f"bytes read: {size(shown.read)} of {size(shown.full)} ({fraction})"
    table = _table(title, "graph", "layer", "read", "of", "", "certificate", "shadow error")
    table.columns[4].justify = "left"
    for layer in shown.layers:
        cells = [size(layer.read), "-" if layer.fraction is None else f"{layer.fraction:.1%}", _bar(layer)]
        table.add_row(layer.graph, str(layer.layer), *cells, _ratio(layer.certificate), _ratio(layer.shadow))
    return table


def _bar(layer: LayerLine) -> str:
    filled = 0 if layer.fraction is None else min(round(layer.fraction * BAR), BAR)
    return "█" * filled + "·" * (BAR - filled)


def _ratio(value: float | None) -> Text:
    """An error over the tolerance; above 1, the promise was missed."""
    if value is None:
        return Text("-")
    return Text(f"{value:.2f}", style="red" if value > 1 else "green")
