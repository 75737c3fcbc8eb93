"""Jinja templates of the Triton kernels."""
