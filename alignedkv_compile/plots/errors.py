"""What ``alignedkv plot`` says when it cannot draw."""

from __future__ import annotations

from ..errors import AlignedKVError


class PlotError(AlignedKVError, RuntimeError):
    """No matplotlib, a file type that is not written, or a run with nothing to draw; the message says which."""
