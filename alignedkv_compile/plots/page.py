"""The pictures of runs as one HTML file that needs no other."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path

import jinja2

from ..run_file import RunFile
from .draw import caption, draw, new_figure
from .series import AnySeries, Extract

_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>alignedkv: {{ sections | map(attribute="title") | join(", ") }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 80em; padding: 0 1em; }
figure { display: inline-block; margin: .5em; }
img { max-width: 100%; }
.note { color: #555; }
</style>
{% for section in sections %}
<h1>{{ section.title }}</h1>
<p class="note">{{ section.machine }}</p>
{% for picture in section.pictures %}
<figure><img alt="{{ picture.alt }}" src="data:image/png;base64,{{ picture.image }}"></figure>
{% endfor %}
{% for line in section.missing %}<p class="note">Not drawn: {{ line }}.</p>
{% endfor %}
{% endfor %}
</html>
"""


def describe_run(run: RunFile) -> str:
    """A run's kind, model and file."""
    model = run.data.get("model")
    return f"{run.kind.value}{f', {model}' if model else ''} ({run.path.name})"


def describe_machine(run: RunFile) -> str:
    """The machine of a run, and the version of torch."""
    found = run.environment
    parts = [found["cpu"], f"{found['cores']} cores", f"{found['threads']} threads", found["capability"]]
    return ", ".join([*map(str, parts), f"torch {found['packages'].get('torch', '')}"])


def write_page(runs: Sequence[tuple[RunFile, Extract]], path: Path) -> None:
    """Write the page to ``path``, making its folder.

    Raises:
        PlotError: matplotlib is not installed.
    """
    sections = [
        {
            "title": describe_run(run),
            "machine": describe_machine(run),
            "pictures": [{"alt": caption(one), "image": _picture(one)} for one in found.series],
            "missing": found.missing,
        }
        for run, found in runs
    ]
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(_PAGE)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(template.render(sections=sections), encoding="utf-8")


def _picture(series: AnySeries) -> str:
    figure, (axis,) = new_figure(1, 1)
    draw(series, axis)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return base64.b64encode(buffer.getvalue()).decode()
