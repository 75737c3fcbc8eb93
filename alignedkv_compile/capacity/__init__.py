"""``alignedkv capacity``: how many tokens fit into a given memory, by the way in which the cache is stored."""
