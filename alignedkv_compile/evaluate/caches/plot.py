"""The plot of kinds of caches: error against held bytes, and answers against held bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import EvaluationError
from .kinds import STOCK
from .result import CacheResult


def draw_caches(result: CacheResult, path: Path) -> None:
    """Write a PNG (or SVG, by the suffix): above, KL to fp32 at each context; below, answers to retrieval questions.

    Raises:
        EvaluationError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise EvaluationError("--plot needs matplotlib; install it with: pip install 'alignedkv-compile[plot]'") from None
    settings = result.settings
    columns = max(len(settings.contexts), len(settings.retrieval_contexts))
    figure = Figure(figsize=(1.5 + 4.5 * columns, 8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, columns, squeeze=False)
    colours = {kind: f"C{index}" for index, kind in enumerate(result.kinds())}
    for axis, context in zip(axes[0], settings.contexts, strict=False):
        _language(axis, result, context, colours)
    for axis, context in zip(axes[1], settings.retrieval_contexts, strict=False):
        _retrieval(axis, result, context, colours)
    for axis in (*axes[0][len(settings.contexts) :], *axes[1][len(settings.retrieval_contexts) :]):
        axis.axis("off")
    handles = {label: handle for axis in axes.flat for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize="small")
    figure.suptitle(f"{result.model}, {settings.dtype}, {settings.text}: ways to store the KV cache")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _language(axis: Any, result: CacheResult, context: int, colours: dict[str, str]) -> None:
    for score in result.language:
        if score.context == context:
            axis.plot([100 * score.bytes], [score.kl_fp32], _marker(score.kind), color=colours[score.kind], label=score.kind)
            if score.kind == STOCK:
                axis.axhline(score.kl_fp32, color=colours[STOCK], linewidth=0.8, linestyle=":")
    _frame(axis, result, context)
    axis.set(yscale="log", ylabel="KL(fp32 || cache), mean, nats")


def _retrieval(axis: Any, result: CacheResult, context: int, colours: dict[str, str]) -> None:
    for kind in result.kinds():
        scores = [score for score in result.retrieval if score.kind == kind and score.context == context]
        right, asked = (sum(getattr(score, field) for score in scores) for field in ("right", "questions"))
        axis.plot([100 * scores[-1].held], [100 * right / asked], _marker(kind), color=colours[kind], label=kind)
    _frame(axis, result, context)
    axis.set(ylim=(-3, 103), ylabel="retrieval questions answered, %")


def _marker(kind: str) -> str:
    return "D" if kind == STOCK else "o"


def _frame(axis: Any, result: CacheResult, context: int) -> None:
    factor = result.factors[context]
    stretched = f", YaRN {factor:g}" if factor > 1 else ""
    axis.set(title=f"{context} rows{stretched}", xlabel="held bytes, % of the 16-bit cache", xlim=(0, None))
    axis.grid(visible=True, which="both", alpha=0.25)
