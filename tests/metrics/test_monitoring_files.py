"""``examples/monitoring``: rules and board name metrics that exist, and Prometheus itself takes them."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import socket
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml

from alignedkv_compile import metrics
from alignedkv_compile.metrics import names
from alignedkv_compile.metrics.names import Kind

FOLDER = Path(__file__).parents[2] / "examples" / "monitoring"
RULES = FOLDER / "alignedkv-rules.yml"
BOARD = FOLDER / "grafana-dashboard.json"

SERIES = re.compile(r"\balignedkv_\w+")
LABELS = re.compile(r"(alignedkv_\w+)\s*\{([^}]*)\}|by \(([^)]*)\)")
ADDED = {"job", "instance", "le"}
"""Labels that Prometheus adds."""


def exposed() -> dict[str, set[str]]:
    """Names of time series, with their labels."""
    found = {}
    for metric in names.METRICS:
        suffixes = ("_bucket", "_count", "_sum") if metric.kind is Kind.HISTOGRAM else ("",)
        found.update({metric.name + suffix: set(metric.labels) for suffix in suffixes})
    return found


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def queries() -> dict[str, str]:
    """Every query of rules and board, by where it stands."""
    found = {f"rule {rule.get('alert') or rule['record']}": rule["expr"] for rule in rules()}
    board = json.loads(BOARD.read_text())
    for panel in board["panels"]:
        found.update({f"panel {panel['title']} {target['refId']}": target["expr"] for target in panel["targets"]})
    found.update({f"variable {one['name']}": one["query"]["query"] for one in board["templating"]["list"] if "refresh" in one})
    return found


def recorded() -> dict[str, set[str]]:
    """Series that the rules make; their labels are in the first part of the name by convention."""
    return {rule["record"]: set(rule["record"].split(":")[0].split("_")) for rule in rules() if "record" in rule}


@pytest.mark.parametrize(("place", "query"), queries().items(), ids=list(queries()))
def test_a_query_names_what_exists(place: str, query: str) -> None:
    known = exposed()
    plain = query
    for name in recorded():
        plain = plain.replace(name, "")
    used = SERIES.findall(plain)
    assert used or plain != query
    assert set(used) <= set(known)
    allowed = ADDED.union(*(known[name] for name in used), *recorded().values())
    for _, matchers, grouping in LABELS.findall(query):
        for part in filter(None, (matchers or grouping).split(",")):
            assert re.split(r"[=!~]", part.strip())[0] in allowed, part


def test_annotations_use_labels_of_their_alert() -> None:
    for rule in rules():
        text = " ".join(rule.get("annotations", {}).values())
        for label in re.findall(r"\$labels\.(\w+)", text):
            series = [name for name in exposed() if name in rule["expr"]]
            assert label == "instance" or any(label in exposed()[name] for name in series), (rule["alert"], label)


def test_the_board_is_what_its_script_writes() -> None:
    assert BOARD.read_text() == runpy.run_path(str(FOLDER / "make_dashboard.py"))["text"]()


def test_every_layer_metric_and_alertable_error_is_on_the_board() -> None:
    text = BOARD.read_text()
    for metric in (names.READ_BYTES, names.FULL_BYTES, names.CACHE_BYTES, names.PLANE_BYTES, names.SHADOW_ERROR, names.SITES):
        assert metric.name in text


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (Debian: apt install prometheus)")
def test_promtool_accepts_the_rules() -> None:
    for kind, path in (("rules", RULES), ("config", FOLDER / "prometheus.yml")):
        done = subprocess.run(["promtool", "check", kind, str(path)], capture_output=True, text=True, cwd=FOLDER, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (Debian: apt install prometheus)")
def test_alerts_fire_when_they_should(tmp_path: Path) -> None:
    """promtool's own unit tests of rules: series go in, alerts come out."""

    def alert(at: str, name: str, labels: dict[str, str] | None) -> dict[str, Any]:
        expected = [] if labels is None else [{"exp_labels": {**labels, "job": "a", "instance": "b"}}]
        return {"eval_time": at, "alertname": name, "exp_alerts": expected}

    def series(name: str, labels: str, values: str) -> dict[str, str]:
        return {"series": f'{name}{{job="a", instance="b"{labels}}}', "values": values}

    layer = ', graph="g/1", layer="0"'
    cases = {
        "interval": "1m",
        "input_series": [
            series("alignedkv_shadow_exceeded_total", layer, "0x9 1x30"),
            series("alignedkv_read_bytes_total", layer, "0+95x40"),
            series("alignedkv_full_bytes_total", layer, "0+100x40"),
            series("alignedkv_streamed_calls_total", ', reason="rebuild-failed"', "0x40"),
        ],
        "alert_rule_test": [
            alert("9m", "AlignedKVErrorAboveTolerance", None),
            alert("12m", "AlignedKVErrorAboveTolerance", {"severity": "warning", "graph": "g/1", "layer": "0"}),
            alert("15m", "AlignedKVReadsEveryByte", None),
            alert("20m", "AlignedKVReadsEveryByte", {"severity": "info"}),
            alert("30m", "AlignedKVPlanesStale", None),
        ],
    }
    bare = yaml.safe_load(RULES.read_text())
    for group in bare["groups"]:
        for rule in group["rules"]:
            rule.pop("annotations", None)  # or the expected texts would have to be here once more
    (tmp_path / "rules.yml").write_text(yaml.safe_dump(bare))
    test = {"rule_files": ["rules.yml"], "evaluation_interval": "1m", "tests": [cases]}
    (tmp_path / "test.yml").write_text(yaml.safe_dump(test))
    done = subprocess.run(["promtool", "test", "rules", "test.yml"], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed (Debian: apt install prometheus)")
def test_prometheus_scrapes_the_endpoint(tmp_path: Path) -> None:
    config = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(RULES)]
    with metrics.start(0) as server:
        config["scrape_configs"][0]["static_configs"][0]["targets"] = [f"127.0.0.1:{server.port}"]
        (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
        base = f"127.0.0.1:{_free_port()}"
        command = ["prometheus", f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/data"]
        with (tmp_path / "log").open("w") as log:
            process = subprocess.Popen([*command, f"--web.listen-address={base}"], stdout=log, stderr=log)
        try:
            found = _wait_for(base, "alignedkv_sites", tmp_path / "log", process)
            loaded = _ask(base, "rules")["groups"]
        finally:
            process.terminate()
            process.wait(30)
    assert {sample["metric"]["state"] for sample in found} == {"rewritten", "prefill", "declined"}
    assert {sample["metric"]["job"] for sample in found} == {"alignedkv"}
    assert {rule["name"] for group in loaded for rule in group["rules"]} == {
        rule.get("alert") or rule["record"] for rule in rules()
    }


def _ask(base: str, path: str) -> Any:
    with urllib.request.urlopen(f"http://{base}/api/v1/{path}", timeout=10) as response:
        return json.load(response)["data"]


def _wait_for(base: str, query: str, log: Path, process: subprocess.Popen[bytes]) -> list[Any]:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if result := _ask(base, f"query?query={query}")["result"]:
                return list(result)
        except OSError:  # not listening yet
            pass
        time.sleep(0.5)
    pytest.fail(log.read_text())
