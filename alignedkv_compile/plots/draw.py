"""Each kind of series on matplotlib's axes, and a figure of all of them."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

from .errors import PlotError
from .fit import break_even
from .series import ALIGNED_NAMES, AnySeries, HeatMap, Latencies, Memory, Quality

INSTALL_EXTRA = "pip install 'alignedkv-compile[plot]'"
COLUMNS = 3
PANEL_INCHES = (5.6, 4.2)
MIB = 2**20
LOGARITHMIC_FROM = 8
"""Ratio of the largest to the smallest context or time from which on latency is drawn on logarithmic axes."""


def new_figure(panels: int, columns: int) -> tuple[Any, list[Any]]:
    """A figure of matplotlib's and axes for ``panels`` pictures.

    Raises:
        PlotError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise PlotError(f"pictures need matplotlib; install it with: {INSTALL_EXTRA}") from None
    columns = min(columns, panels)
    rows = -(-panels // columns)
    figure = Figure(figsize=(PANEL_INCHES[0] * columns, PANEL_INCHES[1] * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for unused in axes[panels:]:
        unused.set_axis_off()
    return figure, axes[:panels]


def draw_all(series: Sequence[tuple[str, AnySeries]], title: str) -> Any:
    """One figure with every series, each under the label that comes with it."""
    figure, axes = new_figure(len(series), COLUMNS)
    for axis, (label, one) in zip(axes, series, strict=True):
        draw(one, axis)
        if label:
            axis.set_title(f"{label}\n{axis.get_title()}")
    figure.suptitle(title)
    return figure


def caption(series: AnySeries) -> str:
    """What a picture shows, in words."""
    return f"{_WHAT[type(series)]}: {series.title}"


def _title(series: AnySeries) -> str:
    return caption(series).replace(": ", "\n", 1)


_WHAT: dict[type, str] = {
    Memory: "memory over tokens",
    Latencies: "latency over context",
    HeatMap: "bytes read by layer and step",
    Quality: "quality over bytes",
}


@functools.singledispatch
def draw(series: object, axis: Any) -> None:
    """Draw a series on an axis."""
    raise TypeError(f"{type(series).__name__} is no series")


@draw.register
def _memory(series: Memory, axis: Any) -> None:
    for index, curve in enumerate(series.curves):
        width = 2 * (len(series.curves) - index)  # stock variants hold the same: the first shows behind the second
        axis.plot(curve.tokens, [held / MIB for held in curve.values], "-", linewidth=width, label=curve.name)
    axis.set(title=_title(series), xlabel="tokens in the cache", ylabel="held, MiB", ylim=(0, None))
    axis.grid(visible=True, alpha=0.25)
    axis.legend(fontsize="small")


@draw.register
def _latencies(series: Latencies, axis: Any) -> None:
    lines = series.lines()
    for index, curve in enumerate(series.curves):
        color = f"C{index}"
        label = f"{curve.name}: {lines[curve.name]}" if curve.name in lines else curve.name
        axis.plot(curve.tokens, curve.values, "o", color=color, label=label)
        for samples in series.samples:
            if samples.name == curve.name:
                axis.plot(samples.tokens, samples.values, ".", color=color, alpha=0.2, markersize=3)
        if curve.name in lines:
            low, high = min(curve.tokens), max(curve.tokens)
            tokens = [low * (high / low) ** (step / 63) for step in range(64)]
            axis.plot(tokens, [lines[curve.name].at(token) for token in tokens], "-", color=color, linewidth=1)
    contexts = [token for curve in series.curves for token in curve.tokens]
    times = [ms for curve in series.curves for ms in curve.values]
    if max(contexts) / min(contexts) >= LOGARITHMIC_FROM:
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
    elif max(times) / min(times) >= LOGARITHMIC_FROM:
        axis.set_yscale("log")
    else:
        axis.set_ylim(0, None)
    title = "\n".join([_title(series), *_crossings(series)])
    axis.set(title=title, xlabel="tokens in the cache", ylabel=f"ms per {series.unit}")
    axis.grid(visible=True, which="both", alpha=0.25)
    axis.legend(fontsize="small", title="ms =" if lines else None)


def _crossings(series: Latencies) -> list[str]:
    """From where on this backend is faster than each other variant, by the fitted lines; two to a line of text."""
    lines = series.lines()
    ours = next((lines[name] for name in ALIGNED_NAMES if name in lines), None)
    if ours is None:
        return []
    others = {name: line for name, line in lines.items() if name not in ALIGNED_NAMES}
    texts = [f"{name} {_from(break_even(ours, line))}" for name, line in others.items()]
    rows = [", ".join(texts[start : start + 2]) for start in range(0, len(texts), 2)]
    return ["faster, by the lines, than", *rows]


def _from(context: float | None) -> str:
    if context is None:
        return "nowhere"
    return f"from {context:.0f}" if context else "everywhere"


@draw.register
def _heat_map(series: HeatMap, axis: Any) -> None:
    image = axis.imshow(
        [[100 * share for share in row] for row in series.shares],
        aspect="auto",
        interpolation="nearest",
        vmin=0,
        cmap="viridis",
    )
    axis.set(title=_title(series), xlabel="decode step", ylabel="layer")
    for direction in (axis.xaxis, axis.yaxis):
        direction.get_major_locator().set_params(integer=True)
    axis.figure.colorbar(image, ax=axis, label="bytes read, % of the layer's")


@draw.register
def _quality(series: Quality, axis: Any) -> None:
    names = list(dict.fromkeys(point.name for point in series.points))
    for name in names:
        points = sorted((point for point in series.points if point.name == name), key=lambda point: point.bytes)
        style = "o-" if name in ALIGNED_NAMES else "s"
        axis.plot([100 * point.bytes for point in points], [point.value for point in points], style, label=name)
        for point in points if name in ALIGNED_NAMES else ():
            axis.annotate(
                point.note, (100 * point.bytes, point.value), xytext=(4, 4), textcoords="offset points", fontsize="small"
            )
    values = [point.value for point in series.points if math.isfinite(point.value)]
    if values and min(values) > 0 and max(values) / min(values) >= 2:
        axis.set_yscale("log")
    axis.set(title=_title(series), xlabel=f"bytes {series.of}, % of the cache", ylabel=series.label, xlim=(0, None))
    axis.grid(visible=True, which="both", alpha=0.25)
    axis.legend(fontsize="small")
