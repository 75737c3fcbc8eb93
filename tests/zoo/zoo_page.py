"""docs/zoo.md, written from the results: the same results make the same page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import torch
import transformers
from zoo_figures import KindFigures, Status, failures, figures, reasons, reasons_of, status
from zoo_results import ClassResult, Verdict

KINDS = ("static", "dynamic")

_HEADER = """# Which models

`make zoo` writes this page. It takes every generative class that the auto classes of transformers name (causal, sequence to
sequence, speech, vision and multimodal), makes a tiny model of it with random weights (two layers, or one of each kind that
its configuration names), and decodes with a StaticCache and with a DynamicCache, in fp32 and in bf16, at tolerance 0 and 2.

**How it is measured.** Seven tokens of prefill by stock eager, then six single tokens, the same for all, so that a sliding
window of ten rows becomes full and rolls. Each step's logits and the whole cache at the end are compared with the same
weights in float64: the error may be three times stock's own in that dtype (eager; where that is exceeded, also
compiled by the backend "eager", whichever errs more), and four roundings of the largest number
(`tests/zoo/zoo_verdict.py`). `min_context` is 0, so that a dozen rows are not too few to skip bits. Graphs go through the
passes and the runtime; PyTorch's own kernels and the operators' references stand in for Inductor's code (`--compiled` runs
the product itself). The weights are scaled so that attention matters: a wrong row of the cache shows.

A class *runs on stock* when it decodes with that cache both eagerly and under `torch.compile(backend="eager")`. Every call
of attention over a KV cache counts, cross-attention too; a cache that a graph takes but that no line of the report speaks of
is *unseen* and counts against the class. Text only: no class is given an image or a sound.

```
make zoo                                     # all classes; it goes on where it was interrupted
make zoo ZOO_ARGS="--only llama,gemma2"      # class names or model types
make zoo ZOO_ARGS="--fresh --jobs 8"
```
"""


def page(results: Sequence[ClassResult]) -> str:
    """The page's text."""
    if not results:
        return f"{_HEADER}\nNo results yet.\n"
    ordered = sorted(results, key=lambda result: result.name)
    parts = [
        _HEADER,
        f"torch {torch.__version__.split('+')[0]}, transformers {transformers.__version__}; {_counts(ordered)}.\n",
        _figures([figures(ordered, kind) for kind in KINDS]),
        _reasons(ordered),
        _failures("Wrong results", ordered, Verdict.WRONG),
        _failures("Exceptions of ours", ordered, Verdict.ERROR),
        _classes(ordered),
        _failures("Not on stock", ordered, Verdict.NOT_ON_STOCK),
    ]
    return "\n".join(part for part in parts if part)


def _counts(results: Sequence[ClassResult]) -> str:
    """How many classes there are in each dtype, and, if the sources changed in between, in each state of them."""
    dtypes = Counter(dtype for result in results for dtype in {run.combination.dtype for run in result.runs})
    text = f"{len(results)} classes: " + ", ".join(f"{count} in {dtype}" for dtype, count in sorted(dtypes.items()))
    versions = Counter(result.version for result in results)
    if len(versions) > 1:
        text += "; sources: " + ", ".join(f"{version} for {count} of them" for version, count in versions.most_common())
    return text


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def _figures(each: Sequence[KindFigures]) -> str:
    header = ["cache", "run on stock", "wrong", "exceptions", "with cached attention", "every site rewritten", "some", "unseen"]
    rows = [
        (one.kind, one.on_stock, one.wrong, one.errors, one.attention, f"{one.every} ({one.share:.0%})", one.some, one.unseen)
        for one in each
    ]
    return "## Figures\n\nNumbers of classes.\n\n" + table(header, rows)


def _reasons(results: Sequence[ClassResult]) -> str:
    found = reasons(results, KINDS)
    rows = [(one.text, *(one.classes[kind] for kind in KINDS), ", ".join(one.examples)) for one in found]
    return "## Why sites stay as they are\n\n" + table(["reason", *KINDS, "for example"], rows) if rows else ""


def _failures(title: str, results: Sequence[ClassResult], verdict: Verdict) -> str:
    rows = failures(results, verdict)
    return f"## {title}\n\n" + table(["class", "message"], [(name, f"`{text}`") for name, text in rows]) if rows else ""


def _classes(results: Sequence[ClassResult]) -> str:
    rows = []
    for result in results:
        each = [status(result, kind) for kind in KINDS]
        if any(one.on_stock for one in each):
            why = "; ".join(reasons_of(result.runs))
            unseen = sorted({layer for run in result.runs for layer in run.unseen})
            why += f"{'; ' if why else ''}unseen: layer {', '.join(unseen)}" if unseen else ""
            rows.append((result.name, *map(_cell, each), why))
    return "## Classes\n\nWhat is rewritten of each class's cached attention.\n\n" + table(["class", *KINDS, "why not"], rows)


def _cell(one: Status) -> str:
    return f"**{one}**" if one in (Status.WRONG, Status.ERROR) else str(one)
