"""`alignedkv compare`: which changes count, in which direction, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from run_samples import KINDS, on, sample, scaled, write
from typer.testing import CliRunner, Result

from alignedkv_compile.cli import app
from alignedkv_compile.compare.errors import ComparisonError
from alignedkv_compile.compare.judge import Limits, Verdict, judge, parse_limits, summarize
from alignedkv_compile.compare.metrics import METRICS
from alignedkv_compile.compare.quantities import Quantity, quantities
from alignedkv_compile.run_file import RunFileError, read_run

LIMITS = Limits(0.05, {})


class Folder:
    """Writes runs, and compares them by the command line."""

    def __init__(self, path: Path) -> None:
        self.path, self._count = path, 0

    def write(self, data: dict[str, Any]) -> str:
        self._count += 1
        return str(write(data, self.path / f"run{self._count}.json"))

    def compare(self, old: dict[str, Any], new: dict[str, Any], *options: str) -> Result:
        return CliRunner().invoke(app, ["compare", self.write(old), self.write(new), *options], env={"COLUMNS": "200"})


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def plain(result: Result) -> str:
    return " ".join(result.output.split())


def verdict(metric: str, old: list[tuple[float, ...]], new: list[tuple[float, ...]], **options: Any) -> Verdict:
    """One quantity's verdict, given the samples of each file."""
    files = [[[Quantity("x", metric, samples, options.get("control", False))] for samples in side] for side in (old, new)]
    (change,) = judge(*files, LIMITS, times_count=options.get("times_count", True))
    return change.verdict


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_is_no_worse_than_itself(folder: Folder, kind: str):
    found = folder.compare(sample(kind), sample(kind))
    assert found.exit_code == 0, found.output
    assert "0 of" in found.output
    assert "worse by more than 5%" in plain(found)


@pytest.mark.parametrize("metric", sorted(METRICS))
def test_each_metric_knows_its_better_direction(metric: str):
    up, down = (verdict(metric, [(1.0, 1.0)], [(value, value)]) for value in (1.2, 0.8))
    higher_is_better = metric in {"top1", "rewritten", "score"}
    assert (up, down) == ((Verdict.BETTER, Verdict.WORSE) if higher_is_better else (Verdict.WORSE, Verdict.BETTER))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("demo", {"ms", "first_token", "held", "bytes", "kl_mean", "kl_p99", "top1", "perplexity", "rewritten"}),
        ("eval", {"bytes", "perplexity", "kl_mean", "kl_p99", "attention_error", "attention_p99", "added_rms", "top1"}),
        ("caches", {"held", "perplexity", "kl_mean", "top1", "score"}),
        ("attention", {"call_ms", "error", "bytes"}),
        ("models", {"ms", "first_token", "held", "bytes", "kl_mean", "kl_p99", "top1", "perplexity", "rewritten"}),
    ],
)
def test_every_kind_of_file_gives_its_figures(tmp_path: Path, kind: str, expected: set[str]):
    found = quantities(read_run(write(sample(kind), tmp_path / "run.json")))
    assert {quantity.metric for quantity in found if not quantity.control} == expected
    assert len({quantity.key for quantity in found}) == len(found)
    assert all("alignedkv" not in quantity.subject for quantity in found if quantity.control)
    assert any(quantity.control for quantity in found)


def test_a_slower_token_fails_and_is_named(folder: Folder):
    found = folder.compare(sample("demo"), scaled(sample("demo"), "alignedkv", "token_ms", 1.1))
    assert found.exit_code == 1
    assert "static 1000 alignedkv" in found.output
    assert "static 3000 alignedkv" in found.output
    assert "+10.0%" in found.output
    assert "2 of" in found.output
    assert folder.compare(sample("demo"), scaled(sample("demo"), "alignedkv", "token_ms", 0.9)).exit_code == 0


def test_the_limit_is_the_users(folder: Folder):
    slower = scaled(sample("demo"), "alignedkv", "token_ms", 1.1)
    assert folder.compare(sample("demo"), slower, "--fail-above", "12%").exit_code == 0
    assert folder.compare(sample("demo"), slower, "--fail-above", "ms=12%").exit_code == 0
    assert folder.compare(sample("demo"), slower, "--fail-above", "12%", "--fail-above", "ms=9%").exit_code == 1


def test_a_slower_stock_is_told_and_not_charged(folder: Folder):
    found = folder.compare(sample("demo"), scaled(sample("demo"), "eager", "token_ms", 1.5))
    assert found.exit_code == 0
    assert "stock moved too" in found.output
    assert "+50.0%" in found.output


def test_more_memory_bytes_and_flips_fail(folder: Folder):
    demo = sample("demo")
    assert folder.compare(demo, scaled(demo, "alignedkv", "held_bytes", 1.1)).exit_code == 1
    more = copy.deepcopy(demo)
    more["comparisons"][0]["bytes"]["fraction"] *= 1.1
    assert folder.compare(demo, more).exit_code == 1
    flipped = sample("eval")
    flipped["scores"][2]["flips"] = 0.2
    found = folder.compare(sample("eval"), flipped)
    assert found.exit_code == 1
    assert "same top-1" in found.output
    retrieval = sample("caches")
    retrieval["retrieval"][1]["right"] = 5
    found = folder.compare(sample("caches"), retrieval)
    assert found.exit_code == 1
    assert "needle 512 8bit" in found.output
    fewer = sample("demo")
    fewer["report"]["rewritten"] = 5
    assert folder.compare(demo, fewer).exit_code == 1


def test_a_change_within_the_spread_of_single_timings_does_not_count():
    wide = (8.0, 9.0, 10.0, 11.0, 12.0)
    assert summarize([Quantity("x", "ms", wide)]).spread == 2.0
    assert verdict("ms", [wide], [tuple(1.15 * value for value in wide)]) is Verdict.WITHIN_NOISE
    assert verdict("ms", [wide], [tuple(1.5 * value for value in wide)]) is Verdict.WORSE


def test_repeated_files_are_compared_by_the_median_of_their_medians():
    old = [(10.0,) * 5, (10.8,) * 5, (9.9,) * 5]
    assert summarize([Quantity("x", "ms", samples) for samples in old]).median == 10.0
    assert verdict("ms", old, [(10.7,) * 5]) is Verdict.WITHIN_NOISE
    assert verdict("ms", old, [(11.2,) * 5]) is Verdict.WORSE
    assert verdict("ms", old, [(10.7,) * 5, (14.0,) * 5, (10.1,) * 5]) is Verdict.WITHIN_NOISE


def test_a_time_that_was_taken_once_is_not_judged():
    assert verdict("first_token", [(3.0,)], [(6.0,)]) is Verdict.NO_REPEATS
    assert verdict("first_token", [(3.0,), (3.1,)], [(6.0,), (6.1,)]) is Verdict.WORSE
    assert verdict("kl_mean", [(3.0,)], [(6.0,)]) is Verdict.WORSE


def test_repetitions_are_given_by_options(folder: Folder):
    old, slower = sample("demo"), scaled(sample("demo"), "alignedkv", "token_ms", 1.12)
    assert folder.compare(old, slower).exit_code == 1
    noisy = folder.write(scaled(old, "alignedkv", "token_ms", 1.2))
    other = folder.write(scaled(old, "alignedkv", "token_ms", 0.95))
    found = folder.compare(old, slower, "--old", noisy, "--old", other)
    assert found.exit_code == 0
    assert "within noise" in found.output


def test_what_is_gone_fails_and_what_is_new_does_not(folder: Folder):
    old, without = sample("models"), sample("models")
    without["models"][0] = {"source": "first", "result": None, "failed": "it raised"}
    found = folder.compare(old, without)
    assert found.exit_code == 1
    assert "gone" in found.output
    back = folder.compare(without, old)
    assert back.exit_code == 0
    assert "new" in back.output


def test_numbers_that_are_none_are_worse():
    assert verdict("kl_mean", [(1.0,)], [(float("nan"),)]) is Verdict.WORSE
    assert verdict("kl_mean", [(float("nan"),)], [(float("nan"),)]) is Verdict.SAME
    assert verdict("kl_mean", [(0.0,)], [(1.0,)]) is Verdict.WORSE
    assert verdict("kl_mean", [(0.0,)], [(0.0,)]) is Verdict.SAME


@given(
    st.lists(st.floats(0.1, 10), min_size=1, max_size=9).map(tuple),
    st.lists(st.floats(0.1, 10), min_size=1, max_size=9).map(tuple),
    st.floats(0, 2),
)
def test_no_verdict_without_a_change_beyond_limit_and_spread(old: tuple[float, ...], new: tuple[float, ...], limit: float):
    files = [[[Quantity("x", "kl_mean", samples)]] for samples in (old, new)]
    (change,) = judge(*files, Limits(limit, {}), times_count=True)
    assert change.old is not None
    assert change.new is not None
    moved = abs(change.new.median - change.old.median)
    noise = max(change.old.spread or 0.0, change.new.spread or 0.0)
    counts = moved > noise and abs(change.relative) > limit
    assert (change.verdict in {Verdict.WORSE, Verdict.BETTER}) == counts
    if counts:
        assert (change.verdict is Verdict.WORSE) == (change.new.median > change.old.median)


def test_other_kinds_and_settings_are_refused(folder: Folder):
    demo = sample("demo")
    found = folder.compare(demo, sample("eval"))
    assert found.exit_code == 2
    assert "different kinds: `alignedkv demo` and `alignedkv eval`" in plain(found)
    other = copy.deepcopy(demo)
    other["settings"]["tolerance"] = 4.0
    found = folder.compare(demo, other)
    assert found.exit_code == 2
    assert "settings.tolerance is 2.0 and 4.0" in plain(found)
    text = sample("eval")
    text["text_sha256"] = "1" * 64
    assert folder.compare(sample("eval"), text).exit_code == 2


def test_other_machines_are_refused_unless_asked_for(folder: Folder):
    demo = sample("demo")
    elsewhere = on(scaled(demo, "alignedkv", "token_ms", 2.0), cpu="Another", kernels="avx512")
    found = folder.compare(demo, elsewhere)
    assert found.exit_code == 2
    assert "cpu is 'A Processor' and 'Another'; kernels is 'avx2' and 'avx512'" in plain(found)
    found = folder.compare(demo, elsewhere, "--across-machines")
    assert found.exit_code == 0
    assert "other machine" in found.output
    more_bytes = scaled(elsewhere, "alignedkv", "held_bytes", 1.1)
    assert folder.compare(demo, more_bytes, "--across-machines").exit_code == 1
    older = copy.deepcopy(demo)
    del older["environment"]["kernels"]
    assert folder.compare(older, demo).exit_code == 0


def test_another_release_of_torch_is_told(folder: Folder):
    newer = on(sample("demo"), packages={"torch": "2.14.1", "transformers": "5.23.0"})
    found = folder.compare(sample("demo"), newer)
    assert found.exit_code == 0
    assert "torch 2.13.0 -> 2.14.1" in found.output


@pytest.mark.parametrize("limit", ["5", "-1%", "fast%", "nan%", "ms=", "ms=3"])
def test_limits_that_are_none_are_refused(folder: Folder, limit: str):
    found = folder.compare(sample("demo"), sample("demo"), "--fail-above", limit)
    assert found.exit_code == 2
    assert "is not a percentage" in plain(found)


def test_unknown_metrics_are_refused_with_a_list():
    with pytest.raises(ComparisonError, match="no metric 'speed'; it knows ms, call_ms"):
        parse_limits(["speed=5%"])


def test_files_that_are_no_runs_are_refused(folder: Folder, tmp_path: Path):
    broken = tmp_path / "broken.json"
    for content, message in (
        ("{", "is not JSON"),
        ("[]", "is not the JSON of a run"),
        ('{"cases": []}', "is not the JSON of a run"),
    ):
        broken.write_text(content)
        with pytest.raises(RunFileError, match=message):
            read_run(broken)
    with pytest.raises(RunFileError, match="cannot read"):
        read_run(tmp_path / "missing.json")
    incomplete = sample("demo")
    del incomplete["comparisons"][0]["timings"][1]["token_ms"]
    found = folder.compare(sample("demo"), incomplete)
    assert found.exit_code == 2
    assert "is incomplete (KeyError: 'token_ms')" in plain(found)


def test_all_lists_what_has_not_moved(folder: Folder):
    brief, full = (folder.compare(sample("demo"), sample("demo"), *options) for options in ((), ("--all",)))
    assert "perplexity" not in brief.output
    assert "perplexity" in full.output
