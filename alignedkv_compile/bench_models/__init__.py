"""``alignedkv bench-models``: the demo's measurements over several models, as one table."""
