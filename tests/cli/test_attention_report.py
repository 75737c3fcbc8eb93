"""The Markdown table of ``make bench``."""

from __future__ import annotations

import run_samples  # noqa: F401  puts benchmarks/ on the path

from alignedkv_compile.break_even import NEVER

from attention_report import Case, Measured, markdown  # isort: skip

NAMES = ("aligned", "stream", "default", "sdpa packed", "sdpa repeated", "sdpa enable_gqa")


def case(context: int, least_context: int, *medians: float) -> Case:
    """Medians by the order of :data:`NAMES`."""
    variants = {
        name: Measured(median, median, (median,), 1e-3, 1e4, 0.25 if name == "aligned" else 1.0, 10.0, 1.0, 10.0)
        for name, median in zip(NAMES, medians, strict=True)
    }
    return Case("8/2/64", context, "bfloat16", 128.0, 4, "", least_context, 0.4, variants)


def test_a_row_has_times_ratios_and_what_the_default_does() -> None:
    table = markdown([case(1024, 2048, 0.05, 0.04, 0.05, 0.2, 12.34, 456.7)])
    row = table.splitlines()[2].strip("| ").split(" | ")
    assert row[:9] == ["8/2/64", "1024", "bf16", "0.050", "0.040", "0.050", "0.200", "12.3", "457"]
    assert row[9:] == ["0.80", "4.00", "4.00", "25.0%", "2048", "40%", "100.0%", "1.250"]
    assert len(row) == table.splitlines()[0].count(" | ") + 1


def test_a_read_that_never_pays_has_no_share() -> None:
    row = markdown([case(1024, NEVER, 0.5, 0.4, 0.4, 1.0, 1.0, 1.0)]).splitlines()[2]
    assert "| never |  |" in row


def test_the_note_names_the_worst_cells_and_skips_what_was_not_run() -> None:
    cases = [
        case(1024, 2048, 1.0, 1.0, 1.04, 3.0, 9.0, 9.0),
        case(4096, 2048, 1.0, 2.0, 1.2, 6.0, 2.4, 9.0),
        Case("8/2/64", 65536, "bfloat16", skipped="needs about 99 GiB of memory"),
    ]
    table, note = markdown(cases).split("\n\n")
    assert len(table.splitlines()) == 4
    assert "in 1 of 2 cells, 1.20 times at most (8/2/64 in bf16 at 4096 rows)" in note
    assert "2.00 times as long as it or more (8/2/64 in bf16 at 4096 rows)" in note


def test_nothing_was_run() -> None:
    assert "No case was run." in markdown([Case("8/2/64", 65536, "bfloat16", skipped="too large")])
