"""``alignedkv eval``: what reading fewer bits costs a model, and how that compares with stock 16-bit and other methods."""
