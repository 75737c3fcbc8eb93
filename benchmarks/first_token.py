"""What the first compiled token of a deep model waits for, and what sharing compiled layers costs each later one.

    python benchmarks/first_token.py
    python benchmarks/first_token.py --layers 12 --json results/first-token.json

A random Llama of SmolLM2-135M's shape, bf16, decodes over a StaticCache after an eager prompt. The first token is timed in a
process of its own for each variant, with an empty folder for Inductor's caches (cold) and again with what that left (warm): the
median of several processes.
Later tokens are timed in one process, one graph of shared layers and one whole graph in turns.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from alignedkv_compile.demo.console import open_console
from alignedkv_compile.demo.environment import describe

PROMPT, CAPACITY = 600, 2048
VARIANTS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "torch.compile": ("inductor", {}),
    "one graph": ("alignedkv", {"share_layers": False, "calibrate": False}),
    "shared layers": ("alignedkv", {"share_layers": True, "calibrate": False}),
}
"""Backend and options by name."""


@dataclass(frozen=True)
class FirstToken:
    """Seconds from the call of the compiled model to its result, ``warm`` the median of ``warm_runs``."""

    variant: str
    cold: float
    warm: float
    warm_runs: tuple[float, ...]


class Decoder:
    """A model, and tokens through compiled forms of it with a cache each."""

    def __init__(self, layers: int) -> None:
        torch.manual_seed(0)
        sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
        config = LlamaConfig(vocab_size=49152, num_hidden_layers=layers, max_position_embeddings=CAPACITY, **sizes)
        self.model = LlamaForCausalLM(config).eval().to(torch.bfloat16)

    def compiled(self, variant: str) -> Callable[[], Any]:
        """Decodes one token; the prompt is in its cache."""
        backend, options = VARIANTS[variant]
        cache = StaticCache(config=self.model.config, max_cache_len=CAPACITY)
        self.model(torch.randint(100, (1, PROMPT)), past_key_values=cache)
        forward = torch.compile(self.model.forward, backend=backend, options=options or None)
        token = torch.zeros((1, 1), dtype=torch.int64)
        return lambda: forward(token, past_key_values=cache)


@torch.no_grad()
def first_token(variant: str, layers: int) -> float:
    """Seconds, in this process."""
    decode = Decoder(layers).compiled(variant)
    started = time.perf_counter()
    decode()
    return time.perf_counter() - started


def in_a_process(variant: str, layers: int, folder: str) -> float:
    """:func:`first_token` in a process of its own, with Inductor's caches in ``folder``."""
    command = [sys.executable, __file__, "--layers", str(layers), "--only-first", variant]
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": folder}
    result = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, text=True)
    return float(result.stdout.splitlines()[-1])


@torch.no_grad()
def later_tokens(layers: int, rounds: int) -> dict[str, float]:
    """Median milliseconds of a token, variants in turns."""
    decoder = Decoder(layers)
    calls = {}
    for variant in ("one graph", "shared layers"):
        torch._dynamo.reset()
        calls[variant] = decoder.compiled(variant)
        calls[variant]()
    times: dict[str, list[float]] = {variant: [] for variant in calls}
    for turn in range(rounds):
        for variant in list(calls)[:: 1 if turn % 2 else -1]:
            started = time.perf_counter()
            calls[variant]()
            times[variant].append(time.perf_counter() - started)
    return {variant: statistics.median(taken) * 1e3 for variant, taken in times.items()}


def main(
    layers: Annotated[int, typer.Option(help="Layers of the model.")] = 30,
    warm_runs: Annotated[int, typer.Option(min=1, help="Processes with full caches, of each variant.")] = 5,
    rounds: Annotated[int, typer.Option(help="Later tokens of each variant.")] = 300,
    only_first: Annotated[str, typer.Option(hidden=True)] = "",
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the results here.")] = None,
) -> None:
    """Time first and later tokens; about 9 minutes on two cores."""
    if only_first:
        print(first_token(only_first, layers))
        return
    console = open_console()
    table = Table("variant", "cold, s", "warm, s", title=f"first compiled token, {layers} layers")
    firsts = []
    for variant in VARIANTS:
        with tempfile.TemporaryDirectory() as folder:
            cold, *warm = (in_a_process(variant, layers, folder) for _ in range(1 + warm_runs))
        firsts.append(FirstToken(variant, cold, statistics.median(warm), tuple(warm)))
        table.add_row(variant, f"{firsts[-1].cold:.1f}", f"{firsts[-1].warm:.1f}")
    console.print(table)
    later = later_tokens(layers, rounds)
    for variant, milliseconds in later.items():
        console.print(f"later tokens, {variant}: {milliseconds:.2f} ms")
    if json_path is not None:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        result = {
            "environment": asdict(describe()),
            "layers": layers,
            "first": [asdict(one) for one in firsts],
            "later_ms": later,
        }
        json_path.write_text(json.dumps(result, indent=1, default=str))


if __name__ == "__main__":
    typer.run(main)
