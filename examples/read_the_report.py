"""What the backend did and did not do: the report, the reasons, the bytes. A tiny random model, no download.

python examples/read_the_report.py
"""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

import alignedkv_compile

CONTEXT = 600


def main() -> None:
    """Decode a few tokens and look at every part of the report."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
        max_position_embeddings=1024,
    )
    model = LlamaForCausalLM(config).bfloat16().eval().requires_grad_(False)
    compiled = torch.compile(model, backend="alignedkv", options={"stats": True, "min_context": 256})

    cache = StaticCache(config=config, max_cache_len=1024)
    with torch.no_grad():
        model(input_ids=torch.randint(0, 256, (1, CONTEXT)), past_key_values=cache)
        for token in range(4):
            compiled(input_ids=torch.tensor([[token]]), past_key_values=cache)

    report = alignedkv_compile.report()
    print(report)
    print("found", report.found, "rewritten", report.rewritten, "declined", report.declined)
    for graph in report.graphs:
        for site in graph.sites:
            print(graph.name, site.name, site.outcome.value, site.reason or "(no reason needed)")

    stats = alignedkv_compile.stats()
    print(f"{stats.bytes_read} of {stats.bytes_full} bytes: {stats.fraction:.1%}")
    for index, layer in enumerate(stats.layers):
        print(f"layer {index}: {layer.fraction:.1%}")


if __name__ == "__main__":
    main()
