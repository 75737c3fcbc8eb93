"""The operators as Triton kernels inside Inductor's graph, for GPUs. No GPU has run or timed them (docs/gpu.md).

``attention.py`` and ``quantize.py`` turn operators that read and that write into kernels from ``templates/``; ``kernel.py``
is the Inductor template that carries them, ``shared.py`` the functions that all have, ``tuning.py`` how they are divided up.
Imported only where Inductor generates Triton, so that a CPU user needs no triton.
"""
