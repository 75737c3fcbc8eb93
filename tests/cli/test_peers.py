"""The benchmark beside other libraries: its rows, lines and refusals, what the quantized peers store, and one tiny run."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from run_samples import MACHINE  # also puts benchmarks/ on the path

from alignedkv_compile.plots.fit import Line
from alignedkv_compile.plots.series import Latencies, extract
from alignedkv_compile.run_file import Kind, read_run

import peers  # isort: skip
import peers_ggml  # isort: skip
import peers_onnxruntime as onnx_peers  # isort: skip
import peers_report as report  # isort: skip
from attention_report import Measured  # isort: skip
from attention_inputs import Layer, Shape, exact_attention, synthetic  # isort: skip
from attention_variants import Prepared  # isort: skip
from peers_base import Copy, Peer, PeerRefusalError, require  # isort: skip

SCRIPT = Path(peers.__file__)
SETTINGS = peers.Settings("bfloat16", 1, 0.0, 1.0, 2.0, peers.INDEPENDENT, 16.0, 24.0)


def measured(ms: float, error: float = 1e-3, share: float = 1.0) -> Measured:
    return Measured(ms, ms, (ms,), error, 1e4, share, 10.0, 1.0, 10.0)


def prepared(layer: Layer) -> Prepared:
    """What a peer outside torch looks at: the layer, no planes."""
    nothing = torch.zeros(0, dtype=torch.uint8)
    return Prepared(layer, nothing, nothing, nothing)


@pytest.mark.parametrize(
    ("line", "other", "text"),
    [
        (Line(0.001, 0.1), Line(0.002, 0.2), "everywhere"),
        (Line(0.001, 1.2), Line(0.002, 0.2), "from 1000"),
        (Line(0.002, 0.2), Line(0.001, 1.2), "up to 1000"),
        (Line(0.002, 0.2), Line(0.001, 0.1), "nowhere"),
        (Line(0.001, 0.1), Line(0.001, 0.1), "nowhere"),
    ],
)
def test_where_a_line_is_faster(line: Line, other: Line, text: str):
    assert report.where_faster(line, other) == text


def test_rows_have_lines_errors_and_reasons():
    contexts = (1000, 2000, 4000)
    cases = [
        report.PeersCase(
            "8/2/64",
            context,
            "bfloat16",
            variants={
                "aligned": measured(1.0 + 0.001 * context, share=100 / context),
                "stream": measured(0.5 + 0.002 * context),
                "int8": measured(0.0005 * context, error=context * 1e-5, share=0.5),
            },
            refused={"missing": "missing is not installed"},
        )
        for context in contexts
    ]
    del cases[1].variants["int8"]
    rows = {row.peer: row for row in report.rows_of(cases, ["aligned", "stream", "int8", "missing"])}
    assert rows["aligned"].cells == ("2.000", "3.000", "5.000")
    assert rows["aligned"].line == "0.001 x tokens + 1"
    assert (rows["aligned"].share, rows["stream"].share) == ("0.03", "1.00")
    assert rows["stream"].faster == ("from 500", "")
    assert rows["int8"].cells == ("0.500", report.NOTHING, "2.000")
    assert rows["int8"].error == "4.0e-02"
    assert rows["int8"].faster == ("nowhere", "nowhere")
    assert rows["missing"] == report.Row("missing", (report.NOTHING,) * 3, "", "", "", ("", ""), "missing is not installed")
    page = report.markdown(cases, {"aligned": "ours", "stream": "", "int8": "", "missing": "theirs"}, "a machine")
    assert "| aligned | 2.000 | 3.000 | 5.000 | 0.03 | 1.0e-03 | 0.001 x tokens + 1 |" in page
    assert "- missing: missing is not installed" in page
    assert len(list(report.tables(cases, list(rows)))) == 2


def test_a_case_that_needs_too_much_memory_says_so_in_its_rows():
    (row,) = report.rows_of([report.PeersCase("8/2/64", 1000, "bfloat16", skipped="needs about 99 GiB")], ["stream"])
    assert row.refused == "needs about 99 GiB"
    assert peers.needed_gib(Shape(32, 8, 128), 2**20, torch.bfloat16, 20, 512) > 100


def test_peers_that_raise_are_rows_with_a_reason():
    def refuses(shape: Shape, dtype: torch.dtype):
        raise PeerRefusalError("no such kernel")

    def breaks(shape: Shape, dtype: torch.dtype):
        raise RuntimeError("\n\nfirst line\nsecond line")

    def works(shape: Shape, dtype: torch.dtype):
        return lambda source: None

    found = [Peer("refuses", "", refuses), Peer("breaks", "", breaks), Peer("works", "", works)]
    openings, refused = peers.open_peers(found, Shape(4, 2, 32), torch.bfloat16)
    assert list(openings) == ["works"]
    assert refused == {"refuses": "no such kernel", "breaks": "RuntimeError: first line"}
    with pytest.raises(PeerRefusalError, match="nosuchmodule is not installed"):
        require("nosuchmodule", "nosuchmodule")
    with pytest.raises(PeerRefusalError, match="no usable ggml in nowhere"):
        peers_ggml.Library(Path("nowhere"), 1)


@pytest.mark.parametrize("wrong", [lambda exact: -exact, lambda exact: exact * float("nan")])
def test_a_wrong_output_is_refused_before_it_is_timed(wrong: Callable[[torch.Tensor], torch.Tensor]):
    layer = synthetic(Shape(4, 2, 32), 64, torch.bfloat16, 16.0)
    exact = exact_attention(layer)
    calls = []

    def copy_with(output: torch.Tensor) -> Copy:
        return Copy(lambda: calls.append(1), lambda: output, layer.bytes_full)

    with pytest.raises(PeerRefusalError, match="output is wrong"):
        peers.Turns(lambda source: copy_with(wrong(exact)), [prepared(layer)], exact, SETTINGS)
    assert not calls
    turns = peers.Turns(lambda source: copy_with(exact * 1.01), [prepared(layer)], exact, SETTINGS)
    assert turns.relative_error == pytest.approx(0.01)
    assert turns.turn() >= 0.0
    assert calls


def test_copies_turns_and_names():
    assert peers.copy_count(2**20, 8.0) == 8
    assert peers.copy_count(2**20, 0.0) == 1
    assert peers.copy_count(1, 8.0) == peers.MAX_COPIES
    assert [peers.rotated("abc", by) for by in (0, 1, 5)] == [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"]]
    every = peers.all_peers(2.0, 1, None)
    assert len({peer.name for peer in every}) == len(every)
    assert [peer.name for peer in every[:2]] == list(report.OURS)
    assert [peer.name for peer in peers.chosen_peers(every, "stream, sdpa")] == [
        "stream",
        "sdpa packed",
        "sdpa repeated",
        "sdpa enable_gqa",
    ]
    with pytest.raises(typer.BadParameter, match="'nothing' begins none of aligned"):
        peers.chosen_peers(every, "nothing")


@pytest.mark.parametrize("cache", [one for one in onnx_peers.CACHE_TYPES if one.quantized], ids=lambda cache: cache.label)
def test_quantized_rows_are_within_half_a_step(cache: onnx_peers.CacheType):
    rows = np.random.default_rng(0).standard_normal((1, 2, 50, 8), dtype=np.float32)
    rows[:, 1, :, 3] = 0.0
    numbers, scales = onnx_peers.quantize(rows, cache)
    assert numbers.nbytes == rows.size * cache.bits // 8
    assert scales.shape == ((1, 2, 1, 8) if cache.scales == "PER_CHANNEL" else (1,))
    if cache.bits == 4:
        halves = np.stack([numbers & 15, numbers >> 4], -1).astype(np.int32) - 8
        numbers = halves.reshape(rows.shape)
    assert np.all(np.abs(numbers * scales - rows) <= scales * 0.501)
    assert np.abs(numbers).max() == 2 ** (cache.bits - 1) - 1


def test_plot_reads_the_file_and_names_refusals(tmp_path: Path):
    case = report.PeersCase(
        "8/2/64", 1024, "bfloat16", variants={"aligned": measured(1.0)}, refused={"openvino u8": "no wheel"}
    )
    path = tmp_path / "peers.json"
    path.write_text(json.dumps(peers.to_json([case], peers.all_peers(2.0, 1, None), SETTINGS, "")))
    run = read_run(path)
    assert run.kind is Kind.PEERS
    found = extract(run)
    (latencies,) = (series for series in found.series if isinstance(series, Latencies))
    assert latencies.curves[0].values == (1.0,)
    assert found.missing == ("8/2/64 1024 bfloat16, openvino u8: no wheel",)
    assert MACHINE.packages.keys() <= run.environment["packages"].keys()


@pytest.mark.slow
def test_script_runs_whatever_is_installed(tmp_path: Path):
    arguments = ["--shapes", "4/2/64", "--contexts", "128", "--rounds", "1", "--turn-ms", "0", "--footprint-mib", "0"]
    arguments += ["--only", "sdpa packed,onnxruntime,openvino,ggml", "--keys", "16", "--threads", "1"]
    paths = ["--json", str(tmp_path / "peers.json"), "--markdown", str(tmp_path / "peers.md")]
    command = [sys.executable, str(SCRIPT), *arguments, *paths]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    run = read_run(tmp_path / "peers.json")
    assert run.kind is Kind.PEERS
    (case,) = run.data["cases"]
    assert case["variants"].keys() | case["refused"].keys() == run.data["peers"].keys()
    assert not case["variants"].keys() & case["refused"].keys()
    assert "sdpa packed" in case["variants"]
    # What 4, 8 and 16 bits can do on 16 effective keys; a wrong layout or scale would be near 1.
    for name, found in case["variants"].items():
        few = "int4" in name or "q4" in name
        bits = "int8" in name or "q8" in name or "u8" in name
        assert found["relative_error"] < (0.5 if few else 0.05 if bits else 0.01), name
        assert found["median_ms"] > 0.0
    assert "### 4/2/64 bfloat16" in (tmp_path / "peers.md").read_text()
