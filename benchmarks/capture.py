"""Save what every layer of SmolLM2-135M hands to attention in one decode step, for ``attention.py --kv``.

    python benchmarks/capture.py results/smollm2.pt --context 7936

The file holds ``query``, ``key`` and ``value``: one tensor per layer, ``[1, 9, 1, 64]`` and ``[1, 3, C, 64]``, after RoPE and
before any repetition for grouped-query attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress, track

from alignedkv_compile.demo.console import open_console
from alignedkv_compile.demo.document import long_document
from alignedkv_compile.demo.model import DemoUnavailableError, load_smollm2
from alignedkv_compile.demo.prefill import prefill
from alignedkv_compile.evaluate.texts import read_text
from alignedkv_compile.storage import DTYPES
from attention_inputs import captured, peakedness

Layers = list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
"""Query, key and value of each layer."""


class Recorder:
    """An attention implementation that keeps its arguments and calls SDPA's."""

    def __init__(self) -> None:
        self.query: list[torch.Tensor] = []
        self.key: list[torch.Tensor] = []
        self.value: list[torch.Tensor] = []

    def __call__(
        self, module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        for kept, tensor in ((self.query, query), (self.key, key), (self.value, value)):
            kept.append(tensor.detach().clone(memory_format=torch.contiguous_format))
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, *args, **kwargs)


@torch.no_grad()
def capture(model: Any, cache: Any, token: torch.Tensor) -> dict[str, list[torch.Tensor]]:
    """Run one decode step of ``token [1, 1]`` over ``cache`` and return every layer's query, key and value."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    recorder = Recorder()
    AttentionInterface.register("alignedkv_capture", recorder)
    AttentionMaskInterface.register("alignedkv_capture", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    before = model.config._attn_implementation
    model.set_attn_implementation("alignedkv_capture")
    try:
        model(input_ids=token, past_key_values=cache)
    finally:
        model.set_attn_implementation(before)
    return {"query": recorder.query, "key": recorder.key, "value": recorder.value}


def decode_steps(text: str, dtype: str, contexts: str, console: Console) -> tuple[str, Iterator[tuple[int, Layers]]]:
    """One decode step of SmolLM2-135M at each of several contexts, captured one by one over one prefill.

    Args:
        text: of ``alignedkv eval``.
        dtype: ``bfloat16`` or ``float16``.
        contexts: cache rows, the decoded token's included, comma-separated.

    Returns:
        The text's SHA-256, and each context with its layers, shortest first.

    Raises:
        typer.BadParameter: another dtype.
    """
    if DTYPES.get(dtype) not in (torch.bfloat16, torch.float16):
        raise typer.BadParameter(f"{dtype!r} is none of bfloat16, float16")
    lengths = sorted(int(part) for part in contexts.split(","))
    loaded = load_smollm2(DTYPES[dtype])
    document = read_text(text, loaded.tokenizer, lengths[-1])
    past, _ = prefill(loaded.model, document.tokens, 1)

    def steps() -> Iterator[tuple[int, Layers]]:
        for context in track(lengths, description=f"{text}, {dtype}", console=console):
            token = document.tokens[:, context - 1 : context]
            found = capture(loaded.model, past.dynamic_cache(context - 1), token)
            yield context, list(zip(found["query"], found["key"], found["value"], strict=True))

    return document.sha256, steps()


def main(
    path: Annotated[Path, typer.Argument(help="File to write.")],
    context: Annotated[int, typer.Option(min=1, help="Cache rows, the decoded token's included.")] = 7936,
    dtype: Annotated[str, typer.Option(help="Of the model and its cache.")] = "bfloat16",
) -> None:
    """Capture one decode step of SmolLM2-135M over Python's library sources."""
    if dtype not in DTYPES:
        raise typer.BadParameter(f"{dtype!r} is none of {', '.join(DTYPES)}")
    console = open_console()
    try:
        loaded = load_smollm2(DTYPES[dtype])
        document = long_document(loaded.tokenizer, context)
    except DemoUnavailableError as error:
        Console(stderr=True).print(f"[red]error:[/] {error}", highlight=False)
        raise typer.Exit(1) from None
    with Progress(console=console) as progress:
        task = progress.add_task("prefill in fp32", total=context)
        past, _ = prefill(loaded.model, document.tokens, 1, lambda steps: progress.advance(task, steps))
    found = capture(loaded.model, past.dynamic_cache(context - 1), document.tokens[:, -1:])
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(found, path)
    console.print(f"{len(found['key'])} layers, {tuple(found['key'][0].shape)} {dtype}: {path}")
    console.print(str(peakedness(captured(path))))


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
