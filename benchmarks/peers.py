"""Decode attention of this backend beside its peers: SDPA, flex_attention, ONNX Runtime, OpenVINO and ggml, in one run on CPUs.

    make bench-peers
    python benchmarks/peers.py --shapes 32/8/128 --contexts 2048,16384 --only aligned,stream,onnxruntime

One decode step of one layer a call, as in benchmarks/attention.py: copies of K and V in each peer's own form go round, so that
no cache is warm; peers take turns in every round, which begins with another one each time; medians over rounds are reported.
What a peer computes is checked against float64 before it is timed: an int8 cache is not the same work. A peer that is not
installed, or cannot run a case, is a row that says why.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import track

from alignedkv_compile.demo.console import open_console
from alignedkv_compile.demo.environment import describe, machine
from alignedkv_compile.ops import COUNTER_FIELDS
from attention import (
    DTYPES,
    MAX_COPIES,
    SHAPES,
    copies_of,
    empty_inductor_cache,
    parse_dtype,
    parse_shape,
    summarize,
)
from attention_inputs import (
    EFFECTIVE_KEYS,
    INDEPENDENT,
    MODEL,
    Layer,
    Shape,
    effective_keys,
    exact_attention,
    layer_of,
    parse_inputs,
)
from attention_variants import ALIGNED, Prepared, prepare
from peers_base import Copy, Opening, Peer, PeerRefusalError, version
from peers_ggml import ggml_peers, load
from peers_onnxruntime import onnxruntime_peers
from peers_openvino import openvino_peers
from peers_report import PeersCase, markdown, tables
from peers_torch import torch_peers

CONTEXTS = (1024, 2048, 4096, 8192, 16384, 32768)
PACKAGES = ("onnx", "onnxruntime", "openvino", "libggml-python")
QUIET_STEP_S, QUIET_SHARE, QUIET_LIMIT_S = 0.01, 0.1, 1.0
"""A turn begins when this process has used less than this share of a step of sleep, or after the limit."""


@dataclass(frozen=True)
class Settings:
    """How to measure; see the command's options."""

    dtype: str
    rounds: int
    turn_ms: float
    footprint_mib: float
    tolerance: float
    inputs: str
    effective_keys: float
    max_gib: float


class Turns:
    """One peer's copies of a layer, gone round turn by turn.

    Attributes:
        relative_error: of the first copy's output, ``||o - o64|| / ||o64||``.
        calls: in a turn: as many as fit into ``turn_ms``, each copy at most once.
    """

    def __init__(self, opening: Opening, sources: Sequence[Prepared], exact: torch.Tensor, settings: Settings) -> None:
        """Make the copies, check the output of the first, and see how long a call takes.

        Raises:
            PeerRefusalError: the output is wrong; what the peer itself raises is not caught.
        """
        first = opening(sources[0])
        self.relative_error = float((first.output().double() - exact).norm() / exact.norm())
        if not self.relative_error < 1.0:
            raise PeerRefusalError(f"its output is wrong: relative error {self.relative_error:.2g} against float64")
        count = copy_count(first.nbytes, settings.footprint_mib)
        self.copies = [first, *(opening(sources[index % len(sources)]) for index in range(1, count))]
        self._next = 0
        wait_until_quiet()
        single = min(self._time(1) for _ in range(3))
        self.calls = max(1, min(count, int(settings.turn_ms / max(single, 1e-6))))
        first.rest()

    def turn(self) -> float:
        """Mean milliseconds of a call: first the others' threads come to rest, and an untimed call wakes the peer's own."""
        wait_until_quiet()
        self._time(1)
        found = self._time(self.calls)
        self.copies[0].rest()
        return found

    def _time(self, calls: int) -> float:
        chosen: list[Copy] = [self.copies[(self._next + index) % len(self.copies)] for index in range(calls)]
        self._next += calls
        start = time.perf_counter()
        for copy in chosen:
            copy.run()
        return 1000 * (time.perf_counter() - start) / calls


def wait_until_quiet() -> None:
    """Sleep until no thread of this process runs: those of other libraries look for work for 0.1 s and more after a call."""
    give_up = time.perf_counter() + QUIET_LIMIT_S
    while time.perf_counter() < give_up:
        before = time.process_time()
        time.sleep(QUIET_STEP_S)
        if time.process_time() - before < QUIET_SHARE * QUIET_STEP_S:
            return


def rotated(names: Sequence[str], by: int) -> list[str]:
    """The same names, beginning with another one in each round."""
    start = by % len(names) if names else 0
    return [*names[start:], *names[:start]]


def copy_count(nbytes: int, footprint_mib: float) -> int:
    """How many copies take ``footprint_mib``, at least one and at most :data:`attention.MAX_COPIES`."""
    return max(1, min(MAX_COPIES, int(footprint_mib * 2**20 // nbytes)))


def needed_gib(shape: Shape, context: int, dtype: torch.dtype, peers: int, footprint_mib: float) -> float:
    """Rough peak memory of a case: every peer's copies, OpenVINO's with room to grow, and K and V repeated per query head."""
    cache = 2 * context * shape.heads * shape.head_dim * dtype.itemsize
    return (1.5 * peers * max(cache, footprint_mib * 2**20) + 4 * cache * shape.group) / 2**30


def open_peers(peers: Sequence[Peer], shape: Shape, dtype: torch.dtype) -> tuple[dict[str, Opening], dict[str, str]]:
    """What each peer opened, and why others did not."""
    openings, refused = {}, {}
    for peer in peers:
        try:
            openings[peer.name] = peer.open(shape, dtype)
        except Exception as error:
            refused[peer.name] = reason(error)
    return openings, refused


def reason(error: Exception) -> str:
    """One line on why a peer has no figures."""
    if isinstance(error, PeerRefusalError):
        return str(error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200] if lines else 'no message'}"


def measure(layer: Layer, openings: Mapping[str, Opening], refused: Mapping[str, str], settings: Settings) -> PeersCase:
    """Time every peer in turns on copies of ``layer``; one that fails at any point is refused."""
    sources = [prepare(one) for one in copies_of(layer, settings.footprint_mib)]
    exact = exact_attention(layer)
    refused = dict(refused)
    turns: dict[str, Turns] = {}
    for name, opening in openings.items():
        try:
            turns[name] = Turns(opening, sources, exact, settings)
        except Exception as error:
            refused[name] = reason(error)
    for source in sources:
        source.counters.zero_()
    rounds: dict[str, list[float]] = {name: [] for name in turns}
    for round_ in range(settings.rounds):
        for name in rotated(list(turns), round_):
            try:
                rounds[name].append(turns[name].turn())
            except Exception as error:
                refused[name] = reason(error)
                del turns[name]
    bytes_read = {name: float(one.copies[0].nbytes) for name, one in turns.items()}
    if ALIGNED in bytes_read:
        bytes_read[ALIGNED] = _counted_bytes(sources)
    found = {name: summarize(rounds[name], one.relative_error, bytes_read[name], layer) for name, one in turns.items()}
    dtype = str(layer.key.dtype).removeprefix("torch.")
    copies = {name: len(one.copies) for name, one in turns.items()}
    return PeersCase(str(layer.shape), layer.context, dtype, effective_keys(layer), "", found, copies, refused)


def _counted_bytes(sources: Sequence[Prepared]) -> float:
    """Bytes that an aligned read counted, per call."""
    counted = torch.stack([source.counters[0] for source in sources]).sum(0).tolist()
    totals = dict(zip(COUNTER_FIELDS, counted, strict=True))
    return float(totals["bytes_read"] / totals["calls"])


def all_peers(tolerance: float, threads: int, ggml: Path | None) -> list[Peer]:
    """Every row of the table, ours first."""
    return [*torch_peers(tolerance), *onnxruntime_peers(threads), *openvino_peers(threads), *ggml_peers(threads, ggml)]


def chosen_peers(peers: Sequence[Peer], only: str) -> list[Peer]:
    """Those whose names begin with one of ``only`` (separated by commas), all if it is empty.

    Raises:
        typer.BadParameter: one is the beginning of no name.
    """
    beginnings = [part.strip() for part in only.split(",") if part.strip()]
    for beginning in beginnings:
        if not any(peer.name.startswith(beginning) for peer in peers):
            raise typer.BadParameter(f"{beginning!r} begins none of {', '.join(peer.name for peer in peers)}")
    return [peer for peer in peers if not beginnings or peer.name.startswith(tuple(beginnings))]


def to_json(cases: Sequence[PeersCase], peers: Sequence[Peer], settings: Settings, ggml: str) -> dict[str, Any]:
    """What the file holds; ``alignedkv plot`` and ``compare`` read it."""
    environment = asdict(describe())
    environment["packages"] |= {name: version(name) for name in PACKAGES} | {"ggml": ggml}
    return {
        "environment": environment,
        "settings": asdict(settings),
        "peers": {peer.name: peer.description for peer in peers},
        "cases": [asdict(case) for case in cases],
    }


def main(
    contexts: Annotated[str, typer.Option(help="Cache rows.")] = ",".join(map(str, CONTEXTS)),
    shapes: Annotated[str, typer.Option(help="Query heads/KV heads/head dimension.")] = ",".join(SHAPES),
    dtype: Annotated[str, typer.Option(help=f"Of the layer: {', '.join(DTYPES)}.")] = "bfloat16",
    only: Annotated[str, typer.Option(help="Peers whose names begin so, separated by commas; all if not given.")] = "",
    ggml: Annotated[Path | None, typer.Option(help="Folder with libggml-base.so and libggml-cpu.so of your own.")] = None,
    tolerance: Annotated[float, typer.Option(min=0.0, help="Of the aligned read.")] = 2.0,
    inputs: Annotated[str, typer.Option(help=f"{MODEL}: made up like a model's. {INDEPENDENT}: numbers.")] = MODEL,
    keys: Annotated[float, typer.Option(min=1.0, help="Effective number of keys of independent inputs.")] = EFFECTIVE_KEYS,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of every peer.")] = 15,
    turn_ms: Annotated[float, typer.Option(min=0.0, help="Length of a turn.")] = 100.0,
    footprint_mib: Annotated[float, typer.Option(min=0.0, help="Copies that each peer keeps, in all.")] = 512.0,
    max_gib: Annotated[float, typer.Option(min=0.1, help="Skip cases that need more memory.")] = 24.0,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of every peer; torch's default if not given.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all results to this file.")] = None,
    markdown_path: Annotated[Path | None, typer.Option("--markdown", help="Write the tables to this file.")] = None,
) -> None:
    """Time decode attention beside peers, in turns. Run on an otherwise idle machine."""
    if threads is not None:
        torch.set_num_threads(threads)
    console = open_console()
    settings = Settings(dtype, rounds, turn_ms, footprint_mib, tolerance, parse_inputs(inputs), keys, max_gib)
    of_layer = parse_dtype(dtype)
    grid = [(parse_shape(name), int(context)) for name in shapes.split(",") for context in contexts.split(",")]
    peers = chosen_peers(all_peers(tolerance, torch.get_num_threads(), ggml), only)
    cases: list[PeersCase] = []
    opened_for: Shape | None = None
    with empty_inductor_cache(), torch.no_grad():
        for shape, context in track(grid, "measuring", console=console):
            needed = needed_gib(shape, context, of_layer, len(peers), footprint_mib)
            if needed > max_gib:
                skipped = f"needs about {needed:.1f} GiB of memory, --max-gib is {max_gib:g}"
                cases.append(PeersCase(str(shape), context, dtype, skipped=skipped))
                continue
            if opened_for != shape:
                torch.compiler.reset()
                openings, refused = open_peers(peers, shape, of_layer)
                opened_for = shape
            cases.append(measure(layer_of(inputs, shape, context, of_layer, keys), openings, refused, settings))
            # After each case: a library that ends the process takes no finished case with it.
            _write_json(json_path, to_json(cases, peers, settings, _ggml_version(torch.get_num_threads(), ggml)))
    for table in tables(cases, [peer.name for peer in peers]):
        console.print(table)
    if markdown_path is not None:
        text = markdown(cases, {peer.name: peer.description for peer in peers}, machine(describe()))
        markdown_path.parent.mkdir(parents=True, exist_ok=True)
        markdown_path.write_text(text, encoding="utf-8")
        console.print(f"tables: {markdown_path}")
    if json_path is not None:
        console.print(f"results: {json_path}")


def _write_json(path: Path | None, found: Mapping[str, Any]) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def _ggml_version(threads: int, folder: Path | None) -> str:
    try:
        return load(threads, folder).features()
    except PeerRefusalError:
        return ""


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
