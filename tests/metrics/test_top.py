"""``alignedkv top``: from the text of an endpoint to the screen."""

from __future__ import annotations

import math
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily
from rich.console import Console
from typer.testing import CliRunner

from alignedkv_compile import metrics
from alignedkv_compile.cli import app
from alignedkv_compile.metrics import names
from alignedkv_compile.metrics.names import Kind, Metric
from alignedkv_compile.top.render import render, size
from alignedkv_compile.top.scrape import EndpointError, Scrape, full_url, parse
from alignedkv_compile.top.view import quantile, view

GRAPH = "LlamaModel/2"
LABELS = {
    names.INFO: [("1.2.3", "2.13.0")],
    names.CACHES: [("static",)],
    names.CACHE_BYTES: [("static",)],
    names.PLANE_BYTES: [("static",)],
    names.COPY_BYTES: [("static",)],
    names.CACHE_UTILISATION: [("static",)],
    names.SITES: [("rewritten",), ("declined",)],
    names.COMPILATIONS: [("LlamaModel", "rewritten")],
    names.STREAMED_CALLS: [("rebuild-failed",)],
    names.READ_BYTES: [(GRAPH, "0"), (GRAPH, "1")],
    names.FULL_BYTES: [(GRAPH, "0"), (GRAPH, "1")],
    names.SHADOW_WORST: [(GRAPH, "0"), (GRAPH, "1")],
}


class Endpoint:
    """Samples as a process would serve them: ``values`` of each metric are in the order of :data:`LABELS`."""

    def __init__(self, values: dict[Metric, list[float]], seconds: list[float]) -> None:
        self.values = values
        self.histogram = Histogram(
            names.CALL_SECONDS.name, "", names.CALL_SECONDS.labels, registry=None, buckets=names.CALL_BUCKETS
        )
        for one in seconds:
            self.histogram.labels(GRAPH, "decode").observe(one)

    def collect(self) -> Any:
        for metric, numbers in self.values.items():
            family = CounterMetricFamily if metric.kind is Kind.COUNTER else GaugeMetricFamily
            made = family(metric.name, "", labels=metric.labels)
            for labels, number in zip(LABELS[metric], numbers, strict=True):
                made.add_metric(labels, number)
            yield made
        yield from self.histogram.collect()

    def text(self) -> str:
        registry = CollectorRegistry()
        registry.register(self)  # type: ignore[arg-type]
        return generate_latest(registry).decode()


VALUES = {
    names.INFO: [1.0],
    names.CACHES: [2.0],
    names.CACHE_BYTES: [3 * 2.0**20],
    names.PLANE_BYTES: [1.5 * 2**20],
    names.COPY_BYTES: [0.0],
    names.CACHE_UTILISATION: [0.25],
    names.SITES: [2.0, 0.0],
    names.COMPILATIONS: [1.0],
    names.STREAMED_CALLS: [0.0],
    names.READ_BYTES: [1000.0, 3000.0],
    names.FULL_BYTES: [4000.0, 4000.0],
    names.SHADOW_WORST: [0.5, 1.25],
}


def screen(shown: Any) -> str:
    console = Console(width=140, color_system=None)
    with console.capture() as capture:
        console.print(render(shown, "http://host/metrics"))
    return capture.get()


def test_one_view() -> None:
    shown = view(parse(Endpoint(VALUES, [0.01] * 98 + [0.05, 4.0]).text()))
    assert shown.seconds is None
    assert (shown.read, shown.full) == (4000, 8000)
    (cache,) = shown.caches
    assert (cache.kind, cache.pairs, cache.plane_bytes, cache.utilisation) == ("static", 2, 1.5 * 2**20, 0.25)
    (calls,) = shown.latencies
    assert (calls.graph, calls.phase, calls.calls, calls.rate) == (GRAPH, "decode", 100, None)
    assert calls.quantiles[0] <= 0.01 < calls.quantiles[2] <= 0.06
    assert [layer.fraction for layer in shown.layers] == [0.25, 0.75]
    assert [layer.shadow for layer in shown.layers] == [0.5, 1.25]
    assert shown.streamed == {}
    text = screen(shown)
    for part in ("alignedkv 1.2.3", "3.0 MiB", "25.0%", GRAPH, "50.0%", "1.25", "2 rewritten", "since the process began"):
        assert part in text


def test_two_scrapes_show_what_happened_in_between() -> None:
    first = parse(Endpoint(VALUES, [4.0] * 10).text())
    grown = {**VALUES, names.READ_BYTES: [1100.0, 3400.0], names.FULL_BYTES: [5000.0, 5000.0], names.STREAMED_CALLS: [3.0]}
    second = parse(Endpoint(grown, [4.0] * 10 + [0.01] * 20).text())
    shown = view(Scrape(first.seconds + 2.0, second.values), first)
    assert [layer.fraction for layer in shown.layers] == [0.1, 0.4]
    assert shown.streamed == {"rebuild-failed": 3}
    (calls,) = shown.latencies
    assert (calls.calls, calls.rate) == (20, 10.0)
    assert max(calls.quantiles) <= 0.01, "the slow calls were before"
    assert shown.caches[0].cache_bytes == 3 * 2**20, "a gauge is no difference"
    assert "3 rebuild-failed" in screen(shown)
    assert "in the last 2.0 s" in screen(shown)


def test_a_process_that_was_restarted_counts_from_zero() -> None:
    first = parse(Endpoint(VALUES, []).text())
    fallen = {**VALUES, names.READ_BYTES: [10.0, 20.0], names.FULL_BYTES: [40.0, 40.0]}
    shown = view(parse(Endpoint(fallen, []).text()), first)
    assert (shown.read, shown.full) == (30, 80)


def test_a_process_without_caches_and_counters() -> None:
    shown = view(parse(Endpoint({names.INFO: [1.0]}, []).text()))
    text = screen(shown)
    for part in ("no cache is kept", "no call has been timed", '"stats": True', "none"):
        assert part in text


@pytest.mark.parametrize(
    ("share", "buckets", "expected"),
    [
        (0.5, [(1.0, 10), (2.0, 10), (math.inf, 10)], 0.5),
        (0.5, [(1.0, 4), (2.0, 8), (math.inf, 8)], 1.0),
        (0.75, [(1.0, 4), (2.0, 8), (math.inf, 8)], 1.5),
        (0.99, [(1.0, 0), (2.0, 1), (math.inf, 100)], 2.0),
        (0.0, [(1.0, 0), (2.0, 3), (math.inf, 3)], 1.0),
    ],
)
def test_quantiles_are_those_of_prometheus(share: float, buckets: list[tuple[float, float]], expected: float) -> None:
    assert quantile(share, buckets[::-1]) == pytest.approx(expected)


def test_no_observation_has_no_quantile() -> None:
    assert math.isnan(quantile(0.5, [(1.0, 0), (math.inf, 0)]))


def test_sizes() -> None:
    assert [size(number) for number in (0, 1023, 1536, 5 * 2**30)] == ["0 B", "1023 B", "1.5 KiB", "5.0 GiB"]


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("localhost:9464", "http://localhost:9464/metrics"),
        ("http://host:1/", "http://host:1/metrics"),
        ("https://host/api/metrics", "https://host/api/metrics"),
    ],
)
def test_what_may_be_left_out_of_an_address(typed: str, meant: str) -> None:
    assert full_url(typed) == meant


@pytest.mark.parametrize("text", ["<html>", "python_info 1\n", ""])
def test_something_else_is_refused(text: str) -> None:
    with pytest.raises(EndpointError, match=r"http://there/metrics.*metrics\.start"):
        parse(text, "http://there/metrics")


def test_the_command_against_a_running_process() -> None:
    with metrics.start(0) as server:
        result = CliRunner().invoke(app, ["top", f"127.0.0.1:{server.port}", "--once"])
        assert result.exit_code == 0, result.output
        assert server.url in result.output
    result = CliRunner().invoke(app, ["top", f"127.0.0.1:{server.port}", "--once"])
    assert result.exit_code == 1
    assert "no metrics of alignedkv at" in " ".join(result.output.split())


def test_the_live_view_goes_on_until_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    from alignedkv_compile.top import run

    looks = []

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(run.time, "sleep", sleep)
    with metrics.start(0) as server:
        result = CliRunner().invoke(app, ["top", server.url, "--interval", "0.5"])
    assert result.exit_code == 0
    assert looks == [0.5] * 3
    assert "in the last" in " ".join(result.output.split()), "wherever the line is broken"
