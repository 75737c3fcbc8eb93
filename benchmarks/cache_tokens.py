"""What a decoded token of SmolLM2-135M takes over each kind of cache: transformers' own with planes beside it, and ours.

    python benchmarks/cache_tokens.py
    python benchmarks/cache_tokens.py --contexts 2048,7936 --kinds static,growing --json results/cache-tokens.json

One model and one document. Each cache holds the same rows, has a graph of its own and decodes the document's next tokens, in
bursts whose order is drawn anew each round. Reported are medians of single tokens, and the bytes that the cache holds after
them, over those of the live rows in 16 bits.
"""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

import alignedkv_compile
from alignedkv_compile.demo.console import open_console
from alignedkv_compile.demo.document import long_document
from alignedkv_compile.demo.environment import describe
from alignedkv_compile.demo.held import held_bytes
from alignedkv_compile.demo.model import LoadedModel, load_smollm2
from alignedkv_compile.demo.prefill import Past, prefill
from alignedkv_compile.storage import PACKED

BURST = 8
"""Tokens that a cache decodes before it is the next one's turn."""
STATIC, GROWING = "static", "growing"
BESIDE = "beside"
RECOMPILE_LIMIT = 64
"""Dynamo's default of 8 counts the graphs of all caches together."""


@dataclass(frozen=True)
class Measured:
    """One cache: median milliseconds of a token, and bytes held over those of its live rows in the model's dtype."""

    kind: str
    context: int
    held_as: str
    token_ms: float
    held: float


def measure(
    model: Any, past: Past, tokens: torch.Tensor, kind: str, context: int, rounds: int, tolerance: float
) -> list[Measured]:
    """All caches of a kind with the first ``context`` rows, over the tokens that follow them."""
    torch._dynamo.reset()
    options: dict[str, Any] = {"tolerance": tolerance}
    forward = torch.compile(model.forward, backend="alignedkv", options=options)
    caches = {name: make(past, kind, context, context + (1 + rounds) * BURST) for name, make in _makers().items()}
    times: dict[str, list[float]] = {name: [] for name in caches}
    for turn in range(1 + rounds):
        for name in random.sample(list(caches), len(caches)):
            first = context + turn * BURST
            for position in range(first, first + BURST):
                token = torch.tensor([[int(tokens[0, position])]])
                started = time.perf_counter()
                caches[name].get_seq_length()  # as generate() does before each token: where a cache of ours grows
                forward(input_ids=token, past_key_values=caches[name])
                if turn:
                    times[name].append(1e3 * (time.perf_counter() - started))
    key, value = past.layers[0]
    live = (context + (1 + rounds) * BURST) * len(past.layers) * sum(x.nbytes // x.shape[2] for x in (key, value))
    return [Measured(kind, context, name, statistics.median(times[name]), held_bytes(caches[name]) / live) for name in caches]


def _makers() -> dict[str, Callable[[Past, str, int, int], Any]]:
    def beside(past: Past, kind: str, context: int, capacity: int) -> Any:
        return past.static_cache(context, capacity) if kind == STATIC else past.dynamic_cache(context)

    def packed(storage: str) -> Callable[[Past, str, int, int], Any]:
        def make(past: Past, kind: str, context: int, capacity: int) -> Any:
            size = {"max_cache_len": capacity} if kind == STATIC else {}
            return past.fill(alignedkv_compile.Cache(past.config, storage, **size), context)

        return make

    return {BESIDE: beside} | {storage: packed(storage) for storage in PACKED}


def main(
    contexts: Annotated[str, typer.Option(help="Rows in the caches before the first token.")] = "2048,7936",
    kinds: Annotated[str, typer.Option(help=f"{STATIC} and {GROWING} caches.")] = f"{STATIC},{GROWING}",
    rounds: Annotated[int, typer.Option(min=1, help=f"Bursts of {BURST} tokens, of each cache.")] = 20,
    tolerance: Annotated[float, typer.Option(min=0.0, help="Of the reads.")] = 2.0,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all results to this file.")] = None,
) -> None:
    """Compare caches by whole tokens. Run on an otherwise idle machine."""
    console = open_console()
    rows = list(map(int, contexts.split(",")))
    with console.status("loading, and a prompt in fp32"), torch.no_grad():
        loaded: LoadedModel = load_smollm2()
        tokens = long_document(loaded.tokenizer, max(rows) + (1 + rounds) * BURST).tokens
        past, _ = prefill(loaded.model, tokens[:, : max(rows) + 1], reference_rows=1)
    found: list[Measured] = []
    table = Table("cache", "rows", "held as", "bytes held", "ms per token", "beside / it", title="SmolLM2-135M, bf16")
    patched = torch.compiler.config.patch(recompile_limit=RECOMPILE_LIMIT)  # type: ignore[attr-defined]
    with torch.no_grad(), patched:
        for kind in kinds.split(","):
            for context in rows:
                with console.status(f"{kind} caches, {context} rows"):
                    group = measure(loaded.model, past, tokens, kind, context, rounds, tolerance)
                for one in group:
                    ratio = group[0].token_ms / one.token_ms
                    table.add_row(kind, str(context), one.held_as, f"{one.held:.3f}", f"{one.token_ms:.2f}", f"{ratio:.3f}x")
                found += group
    console.print(table)
    if json_path is not None:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(
            json.dumps({"environment": asdict(describe()), "found": [asdict(one) for one in found]}, indent=1) + "\n"
        )
        console.print(f"results: {json_path}")


if __name__ == "__main__":
    typer.run(main)
