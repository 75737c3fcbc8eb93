"""What metrics and shadow checks cost a decoded token of SmolLM2-135M.

    python benchmarks/metrics_overhead.py
    python benchmarks/metrics_overhead.py --context 7936 --rounds 200

Variants take turns token by token, over one model, one cache and, but for the shadow checks, one compiled graph:

    off        counters (stats) but nobody registered: the baseline
    on         metrics registered: each call is timed
    scraped    a scrape begins with the token, in another thread: what one token in some hundreds meets
    returned   a graph for shadow checks, in a call that is not checked
    checked    the same graph, in a call that is

The direct costs, which the noise between tokens hides, are timed alone: what a timed call adds, and a scrape.
"""

from __future__ import annotations

import json
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from prometheus_client import CollectorRegistry, generate_latest
from rich.table import Table

from alignedkv_compile import metrics
from alignedkv_compile.call_times import CALL_TIMES, TimedGraph
from alignedkv_compile.demo.console import open_console
from alignedkv_compile.demo.document import long_document
from alignedkv_compile.demo.environment import describe
from alignedkv_compile.demo.model import load_smollm2
from alignedkv_compile.demo.prefill import prefill

SHADOW_EVERY = 10
DIRECT_CALLS = 20_000


class Decoder:
    """A model, a cache of its own for each graph, and the graphs."""

    def __init__(self, context: int, rounds: int) -> None:
        loaded = load_smollm2()
        self.model = loaded.model
        tokens = long_document(loaded.tokenizer, context + 1).tokens
        self.past, _ = prefill(self.model, tokens[:, :-1], reference_rows=1)
        self.context, self.capacity = context, context + 8 * rounds + 64
        self.token = tokens[:, -1:]

    def graph(self, **options: Any) -> Callable[[], None]:
        """Decodes one token through a graph compiled with these options, which has run a few times already."""
        cache = self.past.static_cache(self.context, self.capacity)
        options = {"strict": True, "calibrate": False, **options}
        compiled = torch.compile(self.model.forward, backend="alignedkv", options=options)

        def step() -> None:
            compiled(input_ids=self.token, past_key_values=cache)

        for _ in range(SHADOW_EVERY):
            step()
        return step


def milliseconds(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return (time.perf_counter() - started) * 1e3


def measure(decoder: Decoder, registry: CollectorRegistry, rounds: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Milliseconds of every token, by variant; and the direct costs, while the caches are there."""
    counted = decoder.graph(stats=True)
    shadowed = decoder.graph(stats=True, shadow_every=SHADOW_EVERY)

    def registered(function: Callable[[], object]) -> float:
        registration = metrics.register(registry)
        try:
            return milliseconds(function)
        finally:
            registration.close()

    def scraped() -> None:
        thread = threading.Thread(target=generate_latest, args=(registry,))
        thread.start()
        counted()
        thread.join()

    variants: dict[str, Callable[[], float]] = {
        "off": lambda: milliseconds(counted),
        "on": lambda: registered(counted),
        "scraped": lambda: registered(scraped),
        "returned": lambda: milliseconds(shadowed),
    }
    times: dict[str, list[float]] = {name: [] for name in (*variants, "checked")}
    names = list(variants)
    for turn in range(1, rounds + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            is_checked = name == "returned" and turn % SHADOW_EVERY == 0
            times["checked" if is_checked else name].append(variants[name]())
    return times, measure_directly(registry)


def measure_directly(registry: CollectorRegistry) -> dict[str, float]:
    """Microseconds that a timed call adds, and milliseconds of a scrape."""
    registration = metrics.register(registry)
    (observe,), graph = CALL_TIMES.observers, TimedGraph("LlamaModel/30", "decode")
    started = time.perf_counter()
    for _ in range(DIRECT_CALLS):
        before = time.perf_counter()
        observe(graph, time.perf_counter() - before)
    added = (time.perf_counter() - started) / DIRECT_CALLS * 1e6
    scrapes = [milliseconds(lambda: generate_latest(registry)) for _ in range(20)]
    registration.close()
    return {"timed_call_us": added, "scrape_ms": statistics.median(scrapes)}


def main(
    context: Annotated[int, typer.Option(min=1, help="Tokens in the cache.")] = 2048,
    rounds: Annotated[int, typer.Option(min=SHADOW_EVERY, help="Tokens of each variant.")] = 100,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all results to this file.")] = None,
) -> None:
    """Decode with and without, and print medians and differences."""
    console, registry = open_console(), CollectorRegistry()
    with torch.no_grad():
        times, direct = measure(Decoder(context, rounds), registry, rounds)
    medians = {name: statistics.median(found) for name, found in times.items()}
    table = Table(title=f"SmolLM2-135M, bf16, after {context} tokens, StaticCache")
    for column in ("variant", "median ms", "to off", "fastest ms"):
        table.add_column(column, justify="left" if column == "variant" else "right")
    for name, median in medians.items():
        table.add_row(name, f"{median:.2f}", f"{median / medians['off'] - 1:+.1%}", f"{min(times[name]):.2f}")
    console.print(table)
    share = direct["timed_call_us"] / 1e3 / medians["off"]
    added, scrape = direct["timed_call_us"], direct["scrape_ms"]
    console.print(f"a timed call adds {added:.2f} us, {share:.4%} of a token; a scrape takes {scrape:.1f} ms")
    if json_path is not None:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        result = {"environment": asdict(describe()), "context": context, "milliseconds": times, "direct": direct}
        json_path.write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    typer.run(main)
