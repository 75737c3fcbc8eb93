"""Writes ``grafana-dashboard.json``: one board, whose panels are listed here as title, unit and queries.

python examples/monitoring/make_dashboard.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
CHOSEN = 'job=~"$job", instance=~"$instance"'
COLOURS = {"status-history": {"max": 1, "color": {"mode": "continuous-GrYlRd"}}}
"""Of the cells of a heat map."""
WIDTH, HEIGHT = 12, 8
"""Of a panel; the board is 24 wide."""


def series(legend: str, query: str) -> dict[str, str]:
    """A query, in which ``CHOSEN`` stands for the label filter of the board's variables."""
    return {"expr": query.replace("CHOSEN", CHOSEN), "legendFormat": legend}


PANELS: list[tuple[str, str, str, list[dict[str, str]]]] = [
    (
        "Bytes read over full",
        "timeseries",
        "percentunit",
        [
            series(
                "{{instance}}",
                "sum by (instance) (rate(alignedkv_read_bytes_total{CHOSEN}[$__rate_interval])) / "
                "(sum by (instance) (rate(alignedkv_full_bytes_total{CHOSEN}[$__rate_interval])) > 0)",
            )
        ],
    ),
    (
        "Decode calls: latency",
        "timeseries",
        "s",
        [
            series(
                f"p{percent}",
                f"histogram_quantile({percent / 100}, sum by (le) "
                '(rate(alignedkv_call_seconds_bucket{CHOSEN, phase="decode"}[$__rate_interval])))',
            )
            for percent in (50, 90, 99)
        ],
    ),
    (
        "Memory of caches",
        "timeseries",
        "bytes",
        [
            series("K and V, {{kind}}", "sum by (kind) (alignedkv_cache_bytes{CHOSEN})"),
            series("planes, {{kind}}", "sum by (kind) (alignedkv_plane_bytes{CHOSEN})"),
            series("copies, {{kind}}", "sum by (kind) (alignedkv_copy_bytes{CHOSEN})"),
        ],
    ),
    (
        "Cache utilisation",
        "timeseries",
        "percentunit",
        [
            series(
                "{{kind}}",
                "sum by (kind) (alignedkv_cache_rows{CHOSEN}) / (sum by (kind) (alignedkv_cache_capacity_rows{CHOSEN}) > 0)",
            )
        ],
    ),
    (
        "Bytes read over full, by layer",
        "status-history",
        "percentunit",
        [
            series(
                "{{layer}}",
                "sum by (layer) (rate(alignedkv_read_bytes_total{CHOSEN}[$__rate_interval])) / "
                "(sum by (layer) (rate(alignedkv_full_bytes_total{CHOSEN}[$__rate_interval])) > 0)",
            )
        ],
    ),
    (
        "Rows read, by tensor and bits",
        "timeseries",
        "rowsps",
        [
            series(
                "{{tensor}}, {{precision}}",
                "sum by (tensor, precision) (rate(alignedkv_rows_total{CHOSEN}[$__rate_interval]))",
            ),
            series("live", "sum (rate(alignedkv_live_rows_total{CHOSEN}[$__rate_interval]))"),
        ],
    ),
    (
        "Error over tolerance (shadow checks)",
        "timeseries",
        "none",
        [
            series("layer {{layer}}", "max by (layer) (alignedkv_shadow_error_ratio{CHOSEN})"),
            series("largest certificate", "max (alignedkv_certificate_ratio{CHOSEN})"),
        ],
    ),
    (
        "Calls of a layer that read every bit",
        "timeseries",
        "cps",
        [series("{{reason}}", "sum by (reason) (rate(alignedkv_streamed_calls_total{CHOSEN}[$__rate_interval]))")],
    ),
    (
        "Attention calls over a KV cache, by state",
        "stat",
        "none",
        [
            series("{{state}}", "sum by (state) (alignedkv_sites{CHOSEN})"),
            series("declined: {{reason}}", "sum by (reason) (alignedkv_declined_sites{CHOSEN}) > 0"),
        ],
    ),
    (
        "Compilations",
        "timeseries",
        "none",
        [
            series(
                "{{function}}, {{outcome}}",
                "sum by (function, outcome) (increase(alignedkv_compilations_total{CHOSEN}[$__rate_interval]))",
            )
        ],
    ),
]


def panel(number: int, title: str, kind: str, unit: str, queries: list[dict[str, str]]) -> dict[str, Any]:
    """One panel, in two columns from left to right."""
    return {
        "id": number + 1,
        "title": title,
        "type": kind,
        "datasource": DATASOURCE,
        "gridPos": {"x": number % 2 * WIDTH, "y": number // 2 * HEIGHT, "w": WIDTH, "h": HEIGHT},
        "fieldConfig": {"defaults": {"unit": unit, "min": 0, **COLOURS.get(kind, {})}, "overrides": []},
        "targets": [{**query, "refId": chr(65 + index), "datasource": DATASOURCE} for index, query in enumerate(queries)],
    }


def variable(name: str, query: str) -> dict[str, Any]:
    """A choice above the board, filled by a query."""
    return {
        "name": name,
        "type": "query",
        "datasource": DATASOURCE,
        "query": {"query": query, "refId": name},
        "refresh": 2,
        "includeAll": True,
        "multi": True,
        "current": {"text": "All", "value": "$__all"},
    }


def dashboard() -> dict[str, Any]:
    """The board as Grafana imports it."""
    source = {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Prometheus"}
    return {
        "uid": "alignedkv",
        "title": "alignedkv: KV cache",
        "tags": ["alignedkv", "pytorch"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "15s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {
            "list": [
                source,
                variable("job", "label_values(alignedkv_build_info, job)"),
                variable("instance", 'label_values(alignedkv_build_info{job=~"$job"}, instance)'),
            ]
        },
        "panels": [panel(number, *entry) for number, entry in enumerate(PANELS)],
    }


def text() -> str:
    """The file's content."""
    return json.dumps(dashboard(), indent=2) + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("grafana-dashboard.json").write_text(text(), encoding="utf-8")
