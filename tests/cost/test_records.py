"""Measurements are made once per machine, and kept in a file that another process reads."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from alignedkv_compile import torch_private
from alignedkv_compile.break_even import LEAST_CONTEXT, MOST_ALIGNED_QUERY_ROWS, NEVER, ReadShape
from alignedkv_compile.cost import options as priced_options
from alignedkv_compile.cost import priced, records
from alignedkv_compile.cost.crossover import MARGIN, Timing
from alignedkv_compile.cost.measure import Accuracy
from alignedkv_compile.cost.records import Records, kind_of
from alignedkv_compile.lowering.isa import ENVIRONMENT_VARIABLE as ISA_VARIABLE
from alignedkv_compile.options import Options

READ = ReadShape(torch.device("cpu"), torch.bfloat16, 2, 4, 64, 64)
KIND = kind_of(READ, Accuracy(2.0, 2.0**-8))
TIMINGS = (Timing(1024, 2.0, 1.0, 2.0, ((0.5, 2.0),)), Timing(4096, 1.0, 2.0, 0.5, ((0.3, 0.5),)))
LEAST, SHARE = 2048, 0.3 + 0.2 * (MARGIN - 0.5) / 1.5  # where the line of the logarithms is 1, and the other the margin


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(torch_private, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(priced_options, "RECORDS", Records())
    monkeypatch.setattr(priced_options, "_FAILED", set())
    monkeypatch.delenv(priced_options.ENVIRONMENT_VARIABLE, raising=False)
    return tmp_path


class Counting:
    """Stands in for measuring; counts how often it does."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, *_: object) -> tuple[Timing, ...]:
        self.calls += 1
        return TIMINGS


def never() -> tuple[Timing, ...]:
    raise AssertionError("measured again")


def test_a_second_process_reads_what_the_first_has_measured() -> None:
    first = Records().find_or(KIND, Counting())
    second = Records().find_or(KIND, never)
    assert second == first
    assert second.least_context == LEAST
    assert second.break_even == pytest.approx(SHARE)
    assert Records().all() == [first]


def test_other_reads_are_kept_in_the_same_file() -> None:
    other = kind_of(READ, Accuracy(0.5, 2.0**-8))
    Records().find_or(KIND, Counting())
    Records().find_or(other, Counting())
    assert {record.kind for record in Records().all()} == {KIND, other}
    assert len(list(Records.path().parent.iterdir())) == 1


def test_another_machine_measures_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    found, counting = Records(), Counting()
    found.find_or(KIND, counting)
    monkeypatch.setattr(records, "processor", lambda: ("another", frozenset()))
    found.find_or(KIND, counting)
    assert counting.calls == 2


@pytest.mark.parametrize("text", ["", "{}", '{"records": [1]}', '{"records": [{"kind": {}, "timings": []}]}'])
def test_a_file_that_cannot_be_read_is_replaced(text: str, caplog: pytest.LogCaptureFixture) -> None:
    Records.path().parent.mkdir()
    Records.path().write_text(text)
    with caplog.at_level(logging.WARNING):
        Records().find_or(KIND, Counting())
    assert str(Records.path()) in caplog.text
    assert [record.kind for record in Records().all()] == [KIND]


def test_a_folder_that_cannot_be_written_is_a_warning(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "alignedkv").write_text("in the way")
    assert Records().find_or(KIND, Counting()).least_context == LEAST
    assert "could not be kept" in caplog.text


def test_another_way_of_timing_is_measured_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    Records().find_or(KIND, Counting())
    monkeypatch.setattr(records, "_method", lambda: "another")
    counting = Counting()
    Records().find_or(KIND, counting)
    assert counting.calls == 1


def test_options_ask_once_for_each_kind_of_read(monkeypatch: pytest.MonkeyPatch) -> None:
    counting = Counting()
    monkeypatch.setattr(priced_options, "measure", counting)
    options = priced(Options())
    assert [options.least_context(READ), options.least_context(READ)] == [LEAST, LEAST]
    assert options.break_even(READ) == pytest.approx(SHARE)
    assert options.without_planes.tolerance == 0
    assert counting.calls == 1


@pytest.mark.parametrize(
    ("options", "least"),
    [
        (Options(calibrate=False), LEAST_CONTEXT),
        (Options(min_context=7), 7),
        (Options(guarantee="worst_case"), LEAST_CONTEXT),
        (Options(tolerance=0.0), LEAST_CONTEXT),
    ],
)
def test_nothing_is_measured_where_nothing_depends_on_it(options: Options, least: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(priced_options, "measure", never)
    assert priced(options).least_context(READ) == least
    assert priced(options).break_even(READ) == 0


@pytest.mark.parametrize(
    ("machine", "isa", "kind", "most"),
    [
        ("amx", "amx", {}, 16),
        ("amx", "amx", {"dtype": torch.float32}, 8),
        ("amx", "amx", {"key_dim": 80}, 8),
        ("amx", "avx512", {}, 8),
        ("amx", "avx2", {}, 4),
        ("avx512", "avx512", {}, 16),
        ("avx512", "avx2", {}, 16),
        ("avx2", "avx2", {}, 16),
        ("avx2", "portable", {"dtype": torch.float16}, 4),
    ],
)
def test_long_queries_are_left_to_stock_attention(
    machine: str, isa: str, kind: dict[str, Any], most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ISA_VARIABLE, isa)
    monkeypatch.setattr(priced_options, "machine_isa", lambda: machine)
    read = replace(READ, **kind)
    for options in (Options(), Options(tolerance=0.0)):
        assert priced(options).most_query_rows(read) == most
        assert priced(options).most_query_rows(replace(read, device=torch.device("cuda"))) > 16
    for options in (Options(calibrate=False), Options(min_context=7), Options(guarantee="worst_case")):
        assert priced(options).most_query_rows(read) > 16


def test_a_query_of_several_rows_is_measured_as_a_larger_group(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def measured(read: ReadShape, accuracy: Accuracy) -> tuple[Timing, ...]:
        asked.append(read.rows_per_head)
        return (Timing(1024, 2.0, 1.0, 2.0), Timing(2048, 1.0, 2.0, 0.5))

    monkeypatch.setattr(priced_options, "measure", measured)
    options = priced(Options())
    found = {rows: options.least_context(replace(READ, query_rows=rows)) for rows in (1, 2, MOST_ALIGNED_QUERY_ROWS)}
    assert asked == [4, 8, 16]
    assert all(LEAST_CONTEXT <= least < 2048 for least in found.values())
    assert options.least_context(replace(READ, group=2, query_rows=4)) == found[2]
    assert asked == [4, 8, 16]


def test_longer_queries_read_every_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(priced_options, "measure", never)
    read = replace(READ, query_rows=MOST_ALIGNED_QUERY_ROWS + 1)
    assert priced(Options()).least_context(read) == NEVER
    assert priced(Options()).break_even(read) == 0
    assert priced(Options(min_context=7)).least_context(read) == 7
    assert priced(Options(calibrate=False)).least_context(read) == LEAST_CONTEXT


def test_nothing_is_measured_for_a_cache_that_is_always_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(priced_options, "measure", never)
    short = ReadShape(READ.device, READ.dtype, 2, 4, 64, 64, LEAST_CONTEXT - 1)
    assert priced(Options()).least_context(short) == LEAST_CONTEXT


def test_the_environment_turns_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(priced_options.ENVIRONMENT_VARIABLE, "0")
    options = Options()
    assert priced(options) is options


def test_a_read_that_cannot_be_timed_is_a_warning(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    tried = []

    def broken(*_: object) -> tuple[Timing, ...]:
        tried.append(1)
        raise OSError("no compiler")

    monkeypatch.setattr(priced_options, "measure", broken)
    options = priced(Options())
    assert [options.least_context(READ) for _ in range(3)] == [LEAST_CONTEXT] * 3
    assert options.break_even(READ) == 0
    assert "no compiler" in caplog.text
    assert len(tried) == 1, "a model of thirty layers does not wait thirty times"
