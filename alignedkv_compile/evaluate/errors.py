"""What `alignedkv eval` says when it cannot run."""

from __future__ import annotations

from ..errors import AlignedKVError


class EvaluationError(AlignedKVError, RuntimeError):
    """A model, text, method or threshold that cannot be evaluated; the message says which and what would do."""
