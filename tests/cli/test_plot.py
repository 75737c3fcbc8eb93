"""`alignedkv plot`: the lines that are fitted, what each picture shows, and the files."""

from __future__ import annotations

import base64
import copy
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from run_samples import CONTEXTS, INTERCEPTS, KINDS, LAYERS, SLOPES, STEPS, on, sample, write
from typer.testing import CliRunner

from alignedkv_compile.cli import app
from alignedkv_compile.plots.draw import draw_all
from alignedkv_compile.plots.fit import Line, break_even, fit_line
from alignedkv_compile.plots.series import Extract, HeatMap, Latencies, Memory, Quality, extract
from alignedkv_compile.run_file import RunFileError, read_run

PNG = b"\x89PNG"


def extracted(data: dict[str, Any], folder: Path) -> Extract:
    return extract(read_run(write(data, folder / "run.json")))


def plot(data: dict[str, Any], folder: Path, name: str, *more: str) -> Any:
    arguments = ["plot", str(write(data, folder / "run.json")), *more, "-o", str(folder / name)]
    return CliRunner().invoke(app, arguments, env={"COLUMNS": "300"})


def test_a_straight_line_is_found_exactly():
    line = fit_line([100, 1000, 5000], [0.5 + 0.01 * tokens for tokens in (100, 1000, 5000)])
    assert line is not None
    assert (line.slope, line.intercept) == (pytest.approx(0.01), pytest.approx(0.5))
    assert line.at(200) == pytest.approx(2.5)
    assert str(line) == "0.01 x tokens + 0.5"
    assert fit_line([100, 100], [1.0, 2.0]) is None


def test_errors_count_in_proportion_to_the_time():
    """One point of four is 20 % off: the line moves less towards it at a long context than least squares of ms would."""
    tokens, ms = [100, 1000, 10_000, 100_000], [1.1, 2.0, 11.0, 120.0]
    line = fit_line(tokens, ms)
    assert line is not None
    assert line.at(100) == pytest.approx(1.1, rel=0.05)
    assert 0.001 < line.slope < 0.0012


def test_break_even():
    ours, flat, parallel = Line(0.001, 12.0), Line(0.003, 10.0), Line(0.001, 20.0)
    assert break_even(ours, flat) == 1000
    assert ours.at(1001) < flat.at(1001)
    assert break_even(flat, ours) is None
    assert break_even(ours, parallel) == 0
    assert break_even(parallel, ours) is None


def test_the_demo_gives_all_four_pictures(tmp_path: Path):
    found = extracted(sample("demo"), tmp_path)
    assert found.missing == ()
    by_kind = {kind: [one for one in found.series if isinstance(one, kind)] for kind in (Latencies, Memory, HeatMap, Quality)}
    assert {kind: len(ones) for kind, ones in by_kind.items()} == {Latencies: 1, Memory: 1, HeatMap: len(CONTEXTS), Quality: 1}
    (latencies,) = by_kind[Latencies]
    for name, slope in SLOPES.items():
        line = latencies.lines()[name]
        assert (line.slope, line.intercept) == (pytest.approx(slope), pytest.approx(INTERCEPTS[name]))
    first_row = CONTEXTS[0] + 1 + 2 + 1  # the first call, two more that warm up, and the first timed one
    (memory,) = by_kind[Memory]
    assert [curve.name for curve in memory.curves] == list(SLOPES)
    assert memory.curves[0].tokens[:STEPS] == tuple(range(first_row, first_row + STEPS))
    assert memory.curves[2].values[0] == 160_000
    heat = by_kind[HeatMap][0]
    assert len(heat.shares) == LAYERS
    assert heat.shares[2] == tuple((30 + step) / 100 for step in range(STEPS))
    (quality,) = by_kind[Quality]
    assert [(point.name, point.bytes) for point in quality.points] == [
        ("eager", 1.0),
        ("torch.compile", 1.0),
        ("alignedkv", 0.2),
    ]


def test_the_figure_shows_what_was_extracted(tmp_path: Path):
    found = extracted(sample("demo"), tmp_path)
    figure = draw_all([("", one) for one in found.series], "title")
    axes = {": ".join(axis.get_title().splitlines()[:2]): axis for axis in figure.axes if axis.get_title()}
    assert set(axes) == {
        "latency over context: static cache",
        "memory over tokens: static cache",
        "bytes read by layer and step: static cache, 1000 tokens",
        "bytes read by layer and step: static cache, 3000 tokens",
        "quality over bytes: 3000 tokens",
    }
    latency = axes["latency over context: static cache"]
    texts = [text.get_text() for text in latency.get_legend().get_texts()]
    assert "alignedkv: 0.002 x tokens + 12" in texts
    assert "faster, by the lines, than\neager from 250, torch.compile from 112" in latency.get_title()
    image = axes["bytes read by layer and step: static cache, 1000 tokens"].images[0].get_array()
    assert image.shape == (LAYERS, STEPS)
    assert image[1, 3] == pytest.approx(23.0)
    assert axes["quality over bytes: 3000 tokens"].get_xlabel() == "bytes read, % of the cache"


def test_the_benchmark_gives_a_line_for_each_variant(tmp_path: Path):
    found = extracted(sample("attention"), tmp_path)
    assert found.missing == ("8/2/64 65536 bfloat16: needs about 99 GiB of memory",)
    (latencies,) = [one for one in found.series if isinstance(one, Latencies)]
    lines = latencies.lines()
    assert lines["aligned"].slope == pytest.approx(1e-5)
    assert break_even(lines["aligned"], lines["stream"]) == pytest.approx(5000, abs=1)
    assert break_even(lines["aligned"], lines["sdpa packed"]) == pytest.approx(0, abs=1)
    (quality,) = [one for one in found.series if isinstance(one, Quality)]
    assert [point.note for point in quality.points if point.name == "aligned"] == ["1024", "16384"]


def test_an_evaluation_gives_its_sweep_as_one_curve(tmp_path: Path):
    found = extracted(sample("eval"), tmp_path)
    quality = found.series[0]
    assert isinstance(quality, Quality)
    sweep = [(point.note, point.bytes, point.value) for point in quality.points if point.name == "alignedkv"]
    assert sweep == [("1", 0.4, 1e-3), ("2", 0.3, 2e-3)]
    assert len(found.series) == 3


def test_kinds_of_caches_are_drawn_by_the_bytes_that_they_hold(tmp_path: Path):
    found = extracted(sample("caches"), tmp_path)
    (quality,) = found.series
    assert isinstance(quality, Quality)
    assert [(point.name, point.bytes, point.value) for point in quality.points] == [("stock", 1.0, 1e-4), ("8bit", 0.55, 2e-4)]
    assert found.missing == ("HF hqq 8-bit: hqq is not installed",)
    (axis,) = draw_all([("", quality)], "title").axes
    assert axis.get_xlabel() == "bytes held, % of the cache"


def test_models_that_were_not_measured_are_told(tmp_path: Path):
    found = extracted(sample("models"), tmp_path)
    assert "second: it is too short" in found.missing
    assert all(one.title.startswith("first, ") for one in found.series)


def test_what_an_older_file_lacks_is_told_and_the_rest_is_drawn(tmp_path: Path):
    old = sample("demo")
    for comparison in old["comparisons"]:
        comparison["bytes"] = {"bytes_read": 1, "bytes_full": 2, "fraction": 0.5}
        for timing in comparison["timings"]:
            del timing["held_bytes"]
    for quality in old["quality"]:
        del quality["bytes"]
    found = extracted(old, tmp_path)
    assert [type(one) for one in found.series] == [Latencies]
    assert [line.split(",")[0].split(":")[0] for line in found.missing] == [
        "memory over tokens",
        *["bytes by layer and step"] * 2,
        "quality over bytes",
    ]
    result = plot(old, tmp_path, "old.png")
    assert result.exit_code == 0
    assert "not drawn: memory over tokens, static cache: the file is of an older version" in result.output


def test_one_context_has_no_line(tmp_path: Path):
    short = sample("demo")
    short["comparisons"] = short["comparisons"][:1]
    found = extracted(short, tmp_path)
    (latencies,) = [one for one in found.series if isinstance(one, Latencies)]
    assert latencies.lines() == {}
    assert any("takes two contexts" in line for line in found.missing)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_run_becomes_an_image(tmp_path: Path, kind: str):
    result = plot(sample(kind), tmp_path, "out/run.png")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out/run.png").read_bytes().startswith(PNG)


def test_the_page_needs_no_other_file(tmp_path: Path):
    other = str(write(on(sample("demo"), cpu="Another <b>"), tmp_path / "other.json"))
    result = plot(sample("models"), tmp_path, "report.html", other)
    assert result.exit_code == 0, result.output
    page = (tmp_path / "report.html").read_text()
    images = re.findall(r'<img alt="([^"]+)"\s+src="data:image/png;base64,([^"]+)"', page)
    assert len(images) == page.count("<img") == 10
    assert all(base64.b64decode(image).startswith(PNG) for _, image in images)
    assert "memory over tokens: first, static cache" in [alt for alt, _ in images]
    assert not re.search(r"https?://|<script|<link", page)
    assert "A Processor, 2 cores, 2 threads, AVX2, torch 2.13.0" in page
    assert "Another &lt;b&gt;" in page
    assert "Not drawn: second: it is too short." in page


def test_several_runs_are_told_apart_in_one_figure(tmp_path: Path):
    runs = [(name, extracted(sample("demo"), tmp_path).series[0]) for name in ("before", "after")]
    titles = [axis.get_title() for axis in draw_all(runs, "two").axes]
    assert [title.splitlines()[:3] for title in titles] == [
        [name, "latency over context", "static cache"] for name in ("before", "after")
    ]


def test_what_cannot_be_drawn_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    wrong = plot(sample("demo"), tmp_path, "run.txt")
    assert wrong.exit_code == 2
    assert "ends in none of .png" in " ".join(wrong.output.split())
    empty = copy.deepcopy(sample("attention"))
    empty["cases"] = empty["cases"][-1:]
    nothing = plot(empty, tmp_path, "run.png")
    assert nothing.exit_code == 1
    assert "there is nothing to draw" in nothing.output
    broken = sample("demo")
    del broken["comparisons"][0]["cache"]
    with pytest.raises(RunFileError, match=r"incomplete \(KeyError: 'cache'\)"):
        extracted(broken, tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    missing = plot(sample("demo"), tmp_path, "run.png")
    assert missing.exit_code == 1
    assert "pip install 'alignedkv-compile[plot]'" in missing.output
