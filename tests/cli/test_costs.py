"""``alignedkv costs``: what was measured on this machine."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from alignedkv_compile import costs_command, torch_private
from alignedkv_compile.cli import app
from alignedkv_compile.cost import options as priced_options
from alignedkv_compile.cost.crossover import Timing
from alignedkv_compile.cost.records import Records

TIMINGS = (Timing(1024, 2.5, 1.0, 2.5, ((0.4, 2.0),)), Timing(4096, 1.5, 3.0, 0.5, ((0.2, 0.5),)))


@pytest.fixture(autouse=True)
def _measurements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = Records()
    monkeypatch.setattr(torch_private, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(priced_options, "RECORDS", records)
    monkeypatch.setattr(costs_command, "RECORDS", records)
    monkeypatch.setattr(priced_options, "measure", lambda *_: TIMINGS)


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["costs", *arguments], env={"COLUMNS": "160"})
    assert result.exit_code == 0, result.output
    return result.output


def test_a_machine_on_which_nothing_was_measured(tmp_path: Path) -> None:
    assert "nothing has been measured" in run()
    assert not list(tmp_path.iterdir())


def test_measured_ahead_and_shown(tmp_path: Path) -> None:
    output = run("32/8/128", "9/3/64", "--dtype", "float16")
    assert "float16, 4 query rows per KV head, head dimension 128" in output
    assert "float16, 3 query rows per KV head, head dimension 64" in output
    assert "2.50 / 1.00" in output
    assert "29% of the bytes" in output
    assert str(Records.path()) in output
    assert Records.path().is_relative_to(tmp_path)
    assert "2.50 / 1.00" in run()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["32x8x128"], "32x8x128"),
        (["9/2/64"], "do not share"),
        (["9/3/64", "--dtype", "int8"], "bfloat16, float16, float32"),
        (["9/3/64", "--tolerance", "0"], "nothing to measure"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["costs", *arguments], env={"COLUMNS": "160"})
    assert result.exit_code == 2
    assert message in result.output
