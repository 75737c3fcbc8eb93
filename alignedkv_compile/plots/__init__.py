"""``alignedkv plot``: pictures of a run: memory, latency, bytes by layer and step, quality over bytes."""
