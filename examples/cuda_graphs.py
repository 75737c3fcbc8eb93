"""A decode loop of one's own with CUDA graphs: how to keep the graph captured, and how to see that it was.

python examples/cuda_graphs.py                      # on a GPU; without one the loop runs, and nothing is captured
TORCH_LOGS=cudagraphs python examples/cuda_graphs.py   # what is recorded and why again, or why not at all
"""

from __future__ import annotations

import statistics
import time
from typing import Annotated

import torch
import typer
from torch._dynamo.utils import counters  # torch has no public way to ask

from model_and_prompt import load_model, long_prompt

UNTIMED = 4
"""First steps that compile, warm up, record, and replay for the first time."""


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main(
    model_name: Annotated[str | None, typer.Option("--model", help="A Hugging Face model; SmolLM2-135M if not given.")] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1)] = 1000,
    new_tokens: Annotated[int, typer.Option(min=UNTIMED + 1)] = 32,
) -> None:
    """Decode greedily after a long prompt, and say whether a CUDA graph did it."""
    from transformers import StaticCache

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer = load_model(model_name)
    model.to(device)
    ids = long_prompt(tokenizer, prompt_tokens).to(device)
    cache = StaticCache(config=model.config, max_cache_len=prompt_tokens + new_tokens)
    decode = torch.compile(model.forward, backend="alignedkv", mode="reduce-overhead")

    token, text, times = ids.new_empty(1, 1), [], []
    with torch.no_grad():
        # Eager, so that the cache lies in ordinary memory and transformers marks it as staying there.
        logits = model(input_ids=ids, past_key_values=cache, logits_to_keep=1).logits
        for _ in range(new_tokens):
            token.copy_(logits[:, -1:].argmax(-1))  # always the same tensor: one of another stride would be another graph
            text.append(token.clone())
            synchronize(device)
            start = time.perf_counter()
            torch.compiler.cudagraph_mark_step_begin()  # from here on the last step's logits may be overwritten
            logits = decode(input_ids=token, past_key_values=cache).logits  # clone what must outlive the next step
            synchronize(device)
            times.append(time.perf_counter() - start)

    print(tokenizer.decode(torch.cat(text, 1)[0]))
    print(f"{1e3 * statistics.median(times[UNTIMED:]):.2f} ms per token, the median after {UNTIMED} steps")
    copied = counters["inductor"]["cudagraph_recorded_non_static_inputs"]  # by recordings; here each copies one, the token
    skips = counters["inductor"]["cudagraph_skips"]
    print(f"captured: {'yes' if copied and not skips else 'no'} (recordings: {copied}, skips: {skips})")


if __name__ == "__main__":
    typer.run(main)
