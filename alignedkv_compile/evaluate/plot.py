"""The Pareto plot: error against bytes."""

from __future__ import annotations

from pathlib import Path

from .errors import EvaluationError
from .result import Result

PANELS = (("kl_mean", "KL(fp32 || method), mean, nats"), ("attention_error", "attention error against float64, mean"))


def draw(result: Result, path: Path) -> None:
    """Write a PNG (or SVG, by the suffix): one row of panels per context.

    Raises:
        EvaluationError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise EvaluationError(
            "--plot and --html need matplotlib; install it with: pip install 'alignedkv-compile[plot]'"
        ) from None
    contexts = result.settings.contexts
    figure = Figure(figsize=(11, 4.2 * len(contexts)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(contexts), len(PANELS), squeeze=False)
    for row, context in zip(axes, contexts, strict=True):
        scores = result.at(context)
        sweep = sorted((s for s in scores if s.tolerance is not None), key=lambda s: s.bytes)
        for axis, (metric, label) in zip(row, PANELS, strict=True):
            axis.plot([100 * s.bytes for s in sweep], [getattr(s, metric) for s in sweep], "o-", label="alignedkv")
            for entry in sweep:
                axis.annotate(
                    f"{entry.tolerance:g}",
                    (100 * entry.bytes, getattr(entry, metric)),
                    xytext=(4, 4),
                    textcoords="offset points",
                )
            for entry in scores:
                if entry.tolerance is None:
                    axis.plot([100 * entry.bytes], [getattr(entry, metric)], "s", label=entry.method)
            axis.set(yscale="log", xlabel="bytes read, % of the cache", ylabel=label, title=f"{context} tokens", xlim=(0, None))
            axis.grid(visible=True, which="both", alpha=0.25)
        row[-1].legend(fontsize="small")
    settings = result.settings
    figure.suptitle(f"{result.model}, {settings.dtype}, {settings.text}; numbers at the points: tolerance")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
