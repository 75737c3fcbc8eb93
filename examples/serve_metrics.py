"""Decode document after document and serve the metrics: something for Prometheus, Grafana and ``alignedkv top`` to look at.

python examples/serve_metrics.py
alignedkv top localhost:9464        # in another terminal
"""

from __future__ import annotations

import itertools
from typing import Annotated

import torch
import typer

import alignedkv_compile
from model_and_prompt import load_model, long_prompt


def main(
    model_name: Annotated[str | None, typer.Option("--model", help="A Hugging Face model; SmolLM2-135M if not given.")] = None,
    port: Annotated[int, typer.Option(help="Where the metrics are served.")] = 9464,
    prompt_tokens: Annotated[int, typer.Option(min=1)] = 2048,
    new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    documents: Annotated[int | None, typer.Option(min=1, help="Stop after so many; not at all if not given.")] = None,
) -> None:
    """Decode greedily, one document after the other, each with a StaticCache of its own."""
    from transformers import StaticCache

    model, tokenizer = load_model(model_name)
    prompt = long_prompt(tokenizer, prompt_tokens)
    decode = torch.compile(model.forward, backend="alignedkv", options={"stats": True, "shadow_every": 200})
    with alignedkv_compile.metrics.start(port) as server, torch.no_grad():
        print(f"metrics: {server.url}")
        for _ in itertools.count() if documents is None else range(documents):
            cache = StaticCache(config=model.config, max_cache_len=prompt_tokens + new_tokens)
            logits = model(input_ids=prompt, past_key_values=cache, logits_to_keep=1).logits
            for _ in range(new_tokens):
                logits = decode(input_ids=logits[:, -1:].argmax(-1), past_key_values=cache).logits


if __name__ == "__main__":
    typer.run(main)
