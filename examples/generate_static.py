"""``generate`` with a StaticCache: the prefill runs eagerly, every decode step through the compiled forward.

python examples/generate_static.py
python examples/generate_static.py --model HuggingFaceTB/SmolLM2-360M-Instruct
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
    from transformers import StaticCache

    model, tokenizer = load_model(model_name)
    ids = long_prompt(tokenizer, prompt_tokens)
    cache = StaticCache(config=model.config, max_cache_len=prompt_tokens + new_tokens)

    # A chunked eager prefill, then the compiled forward: `generate` continues from the cache that it is given.
    with torch.no_grad():
        model(input_ids=ids[:, :-1], past_key_values=cache, logits_to_keep=1)
    model.forward = torch.compile(model.forward, backend="alignedkv", options={"stats": True})
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=new_tokens,
        do_sample=False,
        disable_compile=True,  # transformers' own torch.compile of the decode step, which would use its own backend
        pad_token_id=tokenizer.eos_token_id,
    )

    print(tokenizer.decode(output[0, ids.shape[1] :]))
    print(alignedkv_compile.report())
    print(alignedkv_compile.stats())


if __name__ == "__main__":
    typer.run(main)
