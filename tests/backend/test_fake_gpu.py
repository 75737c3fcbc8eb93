"""CUDA graphs of the decode graph that Inductor generates for a GPU: what Inductor's own checks say. There is no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).with_name("fake_gpu_decode.py")
BENCHMARKS = PROGRAM.parents[2] / "benchmarks"
LAYERS = 2
OF_THE_CACHE = 3 * LAYERS
"""K, V and cumulative_length of each layer."""


@pytest.fixture(scope="module")
def decided() -> dict[str, Any]:
    """Decisions by variant. From a process of its own: the stand-in for CUDA undoes nothing."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(BENCHMARKS)
    printed = subprocess.run([sys.executable, str(PROGRAM)], check=True, env=environment, capture_output=True).stdout
    return json.loads(printed)


@pytest.mark.parametrize("cache", ["marked", "unmarked"])
def test_our_decode_is_captured_whole(decided: dict[str, Any], cache: str) -> None:
    (part,) = decided["variants"][f"alignedkv, {cache}"]
    assert part["skipped"] is None
    assert part["devices"] == ["cuda"], "nothing runs on the host in between"
    assert (part["written"], part["written_but_not_static"]) == (OF_THE_CACHE + LAYERS, 0), "the cache and the planes"
    assert part["copied_at_each_replay"] == 1, "the token"


def test_stock_is_captured_where_transformers_marked_the_cache(decided: dict[str, Any]) -> None:
    (part,) = decided["variants"]["inductor, marked"]
    assert (part["skipped"], part["written"], part["written_but_not_static"]) == (None, OF_THE_CACHE, 0)


@pytest.mark.parametrize("who", ["inductor", "alignedkv without marks"])
def test_an_unmarked_cache_is_what_keeps_a_graph_from_being_captured(decided: dict[str, Any], who: str) -> None:
    (part,) = decided["variants"][f"{who}, unmarked"]
    assert part["written_but_not_static"] == OF_THE_CACHE
    assert f"skipping cudagraphs due to mutated inputs ({OF_THE_CACHE} instances)" in part["skipped"]
    assert "self.cumulative_length.add_(kv_length)" in part["skipped"], "the first of them, and the only one that is named"


def test_nothing_else_is_skipped(decided: dict[str, Any]) -> None:
    assert decided["skips"] == 0
