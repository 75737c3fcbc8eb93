"""``alignedkv compare``: what has become better or worse between two runs, beyond their noise."""
