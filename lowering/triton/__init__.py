"""The operators as Triton kernels inside Inductor's graph, for GPUs."""
