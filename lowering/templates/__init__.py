"""Jinja templates of the generated kernels (package data)."""
