"""Metrics of running graphs: what a scrape reads after calls, and that calls themselves do nothing for it."""

from __future__ import annotations

import gc
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

import alignedkv_compile
from alignedkv_compile import metrics
from alignedkv_compile.call_times import CALL_TIMES
from alignedkv_compile.metrics import names
from alignedkv_compile.ops import COUNTER_FIELDS
from alignedkv_compile.statistics import counter_totals

pytestmark = pytest.mark.usefixtures("no_grad")

OPTIONS = {"tolerance": 2.0, "stats": True, "min_context": 0, "accuracy": "bfloat16"}
"""Those of all tests, so that they share compiled code; test_shadow.py has them too."""
Value = Callable[..., float | None]


@pytest.fixture
def value() -> Iterator[Value]:
    """Reads one sample of a registry that holds the metrics; None when there is none."""
    registry = CollectorRegistry()
    registration = metrics.register(registry)
    yield lambda name, **labels: registry.get_sample_value(name, labels)
    registration.close()


def compile_step(function: Any, **options: Any) -> Any:
    return torch.compile(function, backend="alignedkv", fullgraph=True, options={**OPTIONS, **options})


def graph_label() -> str:
    (key,) = counter_totals()
    return str(key)


def test_counters_of_a_layer(steps: Any, value: Value) -> None:
    alignedkv_compile.reset_stats()
    compiled, inputs = compile_step(steps.static), steps.inputs(640)
    for _ in range(3):
        compiled(*inputs.next())
    graph, statistics = graph_label(), alignedkv_compile.stats()
    assert value(names.CALLS.name, graph=graph, layer="0") == statistics.calls == 3
    assert value(names.READ_BYTES.name, graph=graph, layer="0") == statistics.bytes_read > 0
    assert value(names.FULL_BYTES.name, graph=graph, layer="0") == statistics.bytes_full > 0
    assert value(names.LIVE_ROWS.name, graph=graph, layer="0") == statistics.rows == steps.kv_heads * (1 + 2 + 3)
    for tensor, precision, field in (("key", "full", "key_rows_full"), ("value", "4", "value_rows_hi")):
        found = value(names.ROWS.name, graph=graph, tensor=tensor, precision=precision)
        assert found == getattr(statistics, field)


def test_counters_outlive_their_graph(steps: Any, value: Value) -> None:
    alignedkv_compile.reset_stats()
    compiled, inputs = compile_step(steps.static), steps.inputs(640)
    compiled(*inputs.next())
    graph = graph_label()
    read = value(names.READ_BYTES.name, graph=graph, layer="0")
    compiled(*inputs.next())
    last = alignedkv_compile.stats().bytes_read
    assert last > (read or 0) > 0
    del compiled
    torch._dynamo.reset()
    gc.collect()
    with pytest.raises(alignedkv_compile.StatisticsDisabledError):
        alignedkv_compile.stats()
    for _ in range(2):  # read when the graph is found dead, and remembered
        assert value(names.READ_BYTES.name, graph=graph, layer="0") == last
    alignedkv_compile.reset_stats()
    assert value(names.READ_BYTES.name, graph=graph, layer="0") is None


def test_a_static_cache(steps: Any, value: Value) -> None:
    compiled, inputs = compile_step(steps.static), steps.inputs(640)
    before = {name: value(name, kind="static") or 0 for name in ("alignedkv_caches", "alignedkv_cache_bytes")}
    for _ in range(12):
        compiled(*inputs.next())
    assert value("alignedkv_caches", kind="static") == before["alignedkv_caches"] + 1
    assert value("alignedkv_cache_bytes", kind="static") == before["alignedkv_cache_bytes"] + 2 * inputs.keys.nbytes
    assert (value("alignedkv_plane_bytes", kind="static") or 0) > 0
    if not before["alignedkv_caches"]:
        assert value("alignedkv_cache_rows", kind="static") == 12
        assert value("alignedkv_cache_utilisation_ratio", kind="static") == 12 / 640
    del inputs
    gc.collect()
    assert (value("alignedkv_caches", kind="static") or 0) == before["alignedkv_caches"]


@pytest.mark.slow
def test_a_growing_cache_is_seen_between_calls_and_during_one(
    steps: Any, value: Value, monkeypatch: pytest.MonkeyPatch
) -> None:
    from alignedkv_compile.runtime import Runtime

    gc.collect()
    compiled = compile_step(steps.dynamic)
    rows = [torch.randn(1, steps.kv_heads, 30, steps.head_dim) for _ in range(2)]
    during: list[float | None] = []
    run = Runtime._run

    def spy(self: Runtime, args: Any) -> Any:
        inner = self._compiled

        def scraped(*inputs: object) -> Any:
            during.append(value("alignedkv_cache_rows", kind="dynamic"))
            return inner(*inputs)

        with monkeypatch.context() as patch:
            patch.setattr(self, "_compiled", scraped)
            return run(self, args)

    monkeypatch.setattr(Runtime, "_run", spy)
    for _ in range(3):
        new = [torch.randn(1, heads, 1, steps.head_dim) for heads in (steps.heads, steps.kv_heads, steps.kv_heads)]
        _, *rows = compiled(*new, *rows)
    assert value("alignedkv_cache_rows", kind="dynamic") == 33
    assert during == [30, 31, 32]
    assert value("alignedkv_cache_bytes", kind="dynamic") == 2 * rows[0]._base.nbytes


def test_sites_compilations_and_streamed_calls(steps: Any, value: Value) -> None:
    compile_step(steps.declined)(*steps.inputs(640).next())
    torch._dynamo.reset()
    with torch.inference_mode():
        compile_step(steps.static)(*steps.inputs(640).next())
    assert value("alignedkv_sites", state="declined") == value("alignedkv_sites", state="rewritten") == 1
    assert value("alignedkv_sites", state="prefill") == 0
    assert value("alignedkv_declined_sites", reason="second-writer") == 1
    outcomes = [value("alignedkv_compilations_total", function="", outcome=name) for name in ("rewritten", "unchanged")]
    assert outcomes == [1, 1]
    assert value("alignedkv_streamed_calls_total", reason="no-version-counter") == 1
    assert value("alignedkv_streamed_calls_total", reason="rebuild-failed") == 0


@pytest.mark.slow
def test_certificates(steps: Any, value: Value) -> None:
    alignedkv_compile.reset_stats()
    compiled, inputs = compile_step(steps.static, guarantee="worst_case", tolerance=8.0), steps.inputs(640)
    for _ in range(3):
        compiled(*inputs.next())
    worst = alignedkv_compile.stats().worst_certificate
    assert worst is not None
    assert value(names.CERTIFICATE.name, graph=graph_label(), layer="0") == pytest.approx(worst / 8.0)


def test_calls_are_timed_while_somebody_asks(steps: Any, value: Value) -> None:
    compiled, inputs = compile_step(steps.static), steps.inputs(640)
    compiled(*inputs.next(rows=20))
    for _ in range(2):
        compiled(*inputs.next())
    graph = graph_label()
    assert value("alignedkv_call_seconds_count", graph=graph, phase="prefill") == 1
    assert value("alignedkv_call_seconds_count", graph=graph, phase="decode") == 2
    assert 0 < (value("alignedkv_call_seconds_sum", graph=graph, phase="decode") or 0) < 60
    bounds = [value("alignedkv_call_seconds_bucket", graph=graph, phase="decode", le=le) for le in ("0.001", "+Inf")]
    assert bounds[1] == 2
    assert bounds[0] is not None


def test_without_metrics_no_call_looks_at_the_clock(steps: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from alignedkv_compile import runtime

    compiled, inputs = compile_step(steps.static), steps.inputs(640)
    compiled(*inputs.next())

    def clock() -> float:
        raise AssertionError("a call looked at the clock")

    assert CALL_TIMES.observers == ()
    monkeypatch.setattr(runtime.time, "perf_counter", clock)
    compiled(*inputs.next())


def test_a_call_reads_no_counter(steps: Any, value: Value, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, reading a tensor is what would wait for the device."""
    compiled, inputs = compile_step(steps.static), steps.inputs(640)
    for _ in range(2):
        compiled(*inputs.next())
    args = inputs.next()

    def read(self: torch.Tensor, *_: object) -> None:
        raise AssertionError("a call read a tensor")

    with monkeypatch.context() as patch:
        for name in ("cpu", "item", "tolist", "__int__", "__float__", "__bool__"):
            patch.setattr(torch.Tensor, name, read)
        compiled(*args)
    assert value(names.CALLS.name, graph=graph_label(), layer="0") is not None


def test_scrapes_beside_calls(steps: Any, value: Value) -> None:
    compiled, inputs = compile_step(steps.static), steps.inputs(640)
    compiled(*inputs.next())
    stop, failures, seen = threading.Event(), list[BaseException](), list[float]()

    def scrape() -> None:
        try:
            while not stop.is_set():
                seen.append(value(names.CALLS.name, graph=graph, layer="0") or 0)
        except BaseException as error:
            failures.append(error)

    graph = graph_label()
    thread = threading.Thread(target=scrape)
    thread.start()
    for _ in range(90):
        compiled(*inputs.next())
    stop.set()
    thread.join()
    assert not failures
    assert seen == sorted(seen)


def test_the_server(steps: Any) -> None:
    compiled, inputs = compile_step(steps.static), steps.inputs(640)
    with metrics.start(0) as server:
        compiled(*inputs.next())
        with urllib.request.urlopen(server.url, timeout=30) as response:
            families = {family.name: family for family in text_string_to_metric_families(response.read().decode())}
        with pytest.raises(alignedkv_compile.AlignedKVError, match=f"127.0.0.1:{server.port}.*Port 0"):
            metrics.start(server.port)
    for metric in names.METRICS:
        family = families[metric.name.removesuffix("_total")]
        assert family.type == metric.kind.value
        assert family.documentation == metric.meaning
        assert family.samples or metric.needs
    assert "process_resident_memory_bytes" in families
    assert CALL_TIMES.observers == ()
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(server.url, timeout=30)


def test_a_registry_has_them_once() -> None:
    registry = CollectorRegistry()
    first = metrics.register(registry)
    assert metrics.register(registry) is first
    assert len(CALL_TIMES.observers) == 1
    first.close()
    first.close()
    second = metrics.register(registry)
    assert second is not first
    second.close()
    assert CALL_TIMES.observers == ()


def test_open_telemetry_has_the_same_numbers(steps: Any) -> None:
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import InMemoryMetricReader

    alignedkv_compile.reset_stats()
    reader = InMemoryMetricReader()
    provider = MeterProvider([reader])
    instrumentation = metrics.instrument(provider)
    compiled, inputs = compile_step(steps.static), steps.inputs(640)
    for _ in range(2):
        compiled(*inputs.next())
    data = reader.get_metrics_data()
    assert data is not None
    found = {one.name: list(one.data.data_points) for one in data.resource_metrics[0].scope_metrics[0].metrics}
    (calls,) = found["alignedkv_calls"]
    assert (calls.value, dict(calls.attributes)) == (2, {"graph": graph_label(), "layer": "0"})
    assert {point.attributes["state"] for point in found["alignedkv_sites"]} == {"rewritten", "prefill", "declined"}
    (seconds,) = found["alignedkv_call_seconds"]
    assert seconds.count == 2
    assert tuple(seconds.explicit_bounds) == names.CALL_BUCKETS
    instrumentation.close()
    assert CALL_TIMES.observers == ()
    provider.shutdown()


def test_the_fields_that_are_read_exist() -> None:
    from alignedkv_compile.metrics.read import _BY_LAYER, _ROWS

    assert {*_BY_LAYER.values(), *_ROWS} == set(COUNTER_FIELDS)
