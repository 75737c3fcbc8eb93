"""``generate`` with its default DynamicCache: the per-token copy of the whole cache becomes an append.

python examples/generate_dynamic.py
"""

from __future__ import annotations

from typing import Annotated

import torch
import typer

import alignedkv_compile
from model_and_prompt import load_model, long_prompt


def main(
    model_name: Annotated[str | None, typer.Option("--model", help="A Hugging Face model; SmolLM2-135M if not given.")] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1)] = 1000,
    new_tokens: Annotated[int, typer.Option(min=1)] = 32,
) -> None:
    """Generate text after a long prompt, and say what was rewritten."""
    from transformers import DynamicCache

    model, tokenizer = load_model(model_name)
    ids = long_prompt(tokenizer, prompt_tokens)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=ids[:, :-1], past_key_values=cache, logits_to_keep=1)
    model.forward = torch.compile(model.forward, backend="alignedkv", options={"stats": True})
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.eos_token_id,
    )

    print(tokenizer.decode(output[0, ids.shape[1] :]))
    print(alignedkv_compile.report())
    print(alignedkv_compile.stats())


if __name__ == "__main__":
    typer.run(main)
