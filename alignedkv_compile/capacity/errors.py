"""What ``alignedkv capacity`` says when it cannot tell."""

from __future__ import annotations

from ..errors import AlignedKVError


class CapacityError(AlignedKVError, RuntimeError):
    """A config, a model or a memory limit that cannot be used; the message says which and what would do."""
