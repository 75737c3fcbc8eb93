"""Draw the results of ``attention.py``: time per row against context, one panel per head shape and dtype.

python benchmarks/plot.py results/attention.json results/attention.png
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import matplotlib as mpl
import typer

mpl.use("Agg")
from matplotlib import pyplot as plt


def draw(result: dict[str, Any], path: Path) -> None:
    """Write one figure for the JSON that ``attention.py`` saved.

    Raises:
        ValueError: there is no measured case in it.
    """
    cases = [case for case in result["cases"] if case["variants"]]
    if not cases:
        raise ValueError("no measured case in this file")
    panels = sorted({(case["shape"], case["dtype"]) for case in cases})
    figure, axes = plt.subplots(1, len(panels), figsize=(4.5 * len(panels), 4), squeeze=False, sharey=True)
    for axis, (shape, dtype) in zip(axes[0], panels, strict=True):
        chosen = sorted((c for c in cases if (c["shape"], c["dtype"]) == (shape, dtype)), key=lambda case: case["context"])
        contexts = [case["context"] for case in chosen]
        for name in chosen[0]["variants"]:
            axis.plot(contexts, [case["variants"][name]["ns_per_row"] for case in chosen], marker="o", label=name)
        axis.set(xscale="log", yscale="log", xlabel="context", title=f"{shape} {dtype}")
        axis.set_xscale("log", base=2)
    axes[0][0].set_ylabel("ns per cache row and KV head")
    axes[0][-1].legend()
    environment = result["environment"]
    figure.suptitle(f"{environment['cpu']}, {environment['capability']}, {environment['threads']} threads")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(
    results: Annotated[Path, typer.Argument(help="JSON that attention.py wrote.", exists=True)],
    image: Annotated[Path, typer.Argument(help="File to write, .png or .svg.")],
) -> None:
    """Draw the results of attention.py."""
    draw(json.loads(results.read_text()), image)


if __name__ == "__main__":
    typer.run(main)
