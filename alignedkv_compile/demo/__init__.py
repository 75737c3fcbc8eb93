"""``alignedkv demo``: a real model decodes a real document, stock PyTorch and this backend side by side."""
