"""``alignedkv eval-caches``: what each way of storing a KV cache costs in quality, and the bytes that it holds."""
