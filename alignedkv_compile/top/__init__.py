"""``alignedkv top``: a live view of a running process's metrics, from any terminal that reaches its endpoint."""
