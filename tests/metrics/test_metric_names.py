"""The table of metrics: names as Prometheus wants them, and labels for every note about stale planes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from alignedkv_compile import state
from alignedkv_compile.metrics import names
from alignedkv_compile.metrics.names import Kind, Metric
from alignedkv_compile.metrics.stream_reasons import OTHER, STREAM_REASONS, reason_label

ROOT = Path(__file__).parents[2]


def test_names_are_unique() -> None:
    assert len({metric.name for metric in names.METRICS}) == len(names.METRICS)
    assert set(names.METRICS) == {value for value in vars(names).values() if isinstance(value, Metric)}


@pytest.mark.parametrize("metric", names.METRICS, ids=lambda metric: metric.name)
def test_a_name_follows_prometheus(metric: Metric) -> None:
    assert metric.name.startswith("alignedkv_")
    assert metric.name == metric.name.lower()
    assert metric.name.endswith("_total") == (metric.kind is Kind.COUNTER)
    assert not metric.meaning.endswith(".")


def test_every_note_about_stale_planes_has_a_label() -> None:
    notes = {
        value
        for path in Path(state.__path__[0]).glob("*.py")
        for name, value in vars(sys.modules.get(f"alignedkv_compile.state.{path.stem}", object)).items()
        if name.isupper() and isinstance(value, str)
    }
    assert len(notes) >= 6
    assert {reason_label(f"{note}and so on") for note in notes} == set(STREAM_REASONS)
    assert reason_label("a note that nobody has written yet") == OTHER


def test_the_documentation_has_every_metric() -> None:
    text = (ROOT / "docs" / "monitoring.md").read_text()
    for metric in names.METRICS:
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        assert f"| `{metric.name}` | {metric.kind.value} | {labels} | {metric.meaning}" in text


def test_a_missing_client_is_named_and_the_package_imports_without_it() -> None:
    calls = {"start(0)": "prometheus_client", "register()": "prometheus_client", "instrument()": "opentelemetry"}
    program = f"""
import sys
sys.modules["prometheus_client"] = sys.modules["opentelemetry"] = None
import alignedkv_compile
for call in {list(calls)}:
    try:
        eval("alignedkv_compile.metrics." + call)
    except alignedkv_compile.AlignedKVError as error:
        print(error)
"""
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert len(output.splitlines()) == len(calls)
    for line, module in zip(output.splitlines(), calls.values(), strict=True):
        assert line.startswith(f"{module} is not installed: pip install")
