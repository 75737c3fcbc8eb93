"""What ``alignedkv compare`` says when two runs cannot be compared."""

from __future__ import annotations

from ..errors import AlignedKVError


class ComparisonError(AlignedKVError, ValueError):
    """Runs of different kinds, settings or machines, or a limit that is none; the message says which."""
