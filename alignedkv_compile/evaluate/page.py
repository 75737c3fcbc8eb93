"""The evaluation as one HTML file that needs no other: tables, plot, and where it was measured."""

from __future__ import annotations

import base64
import tempfile
from pathlib import Path

import jinja2

from .plot import draw
from .render import tables
from .result import Result

_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>alignedkv eval: {{ result.model }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em; }
table { border-collapse: collapse; margin: 1em 0; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: .3em 0; }
th, td { padding: .2em .8em; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; }
.note { color: #555; margin-top: -.6em; }
.failed { color: #b00; }
</style>
<h1>{{ result.model }}: reading fewer bits of the KV cache</h1>
<p>{{ result.settings.dtype }}, text {{ result.settings.text }} (SHA-256 {{ result.text_sha256 }}),
{{ result.settings.positions }} teacher-forced positions at each context.</p>
{% for line in result.violations %}<p class="failed">Above the limit: {{ line }}</p>
{% endfor %}
<img alt="error against bytes read" src="data:image/png;base64,{{ image }}">
{% for table in tables %}
<table><caption>{{ table.title }}</caption>
<tr>{% for head in table.heads %}<th>{{ head }}</th>{% endfor %}</tr>
{% for row in table.rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table>
<p class="note">{{ table.note }}</p>
{% endfor %}
<p>{{ result.environment.cpu }}, {{ result.environment.capability }}, {{ result.environment.threads }} threads; Python
{{ result.environment.python }}
{%- for name, version in result.environment.packages.items() if version %}, {{ name }} {{ version }}{% endfor %}.</p>
</html>
"""


def write_page(result: Result, path: Path) -> None:
    """Write the page to ``path``, making its folder.

    Raises:
        EvaluationError: matplotlib is not installed.
    """
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder) / "pareto.png"
        draw(result, image)
        encoded = base64.b64encode(image.read_bytes()).decode()
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(_PAGE)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(template.render(result=result, tables=tables(result), image=encoded), encoding="utf-8")
