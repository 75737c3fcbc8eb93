"""When rows that are kept once more beside a pair of cache tensors must be copied anew, and when planes pay for a copy."""

from __future__ import annotations

import enum

import torch

from .tensor_identity import observe

MAX_CONSECUTIVE_COPIES = 4
"""So many calls in a row may find the cache changed and have planes made for it; then somebody evidently writes it between all
calls, and rows are copied without planes."""

CHANGED_TOO_OFTEN = (
    f"the cache was written by other code before each of {MAX_CONSECUTIVE_COPIES} calls in a row; its rows are copied at each"
    " call and every bit is read"
)
COPIED_AT_EACH_CALL = (
    "the cache was allocated under torch.inference_mode(): such tensors count no versions, so a write by anybody else would go"
    " unseen; its rows are copied at each call and every bit is read (allocate the cache under torch.no_grad(), or set"
    " assume_exclusive_cache)"
)


class Look(enum.Enum):
    """What a call finds."""

    SAME = enum.auto()
    """The cache is as the last call left it."""
    CHANGED = enum.auto()
    """It is not, and its rows must be copied."""
    CHANGED_AGAIN = enum.auto()
    """They must be copied, and planes would be made in vain: at the next call it will have changed again."""


class CopyHistory:
    """Compares a pair of cache tensors with what the last call left behind.

    Attributes:
        note: why planes would be made in vain, or "".
    """

    __slots__ = ("_copies", "_seen", "note")

    def __init__(self) -> None:
        self._copies = 0
        self._seen: object = None
        self.note = ""

    def look(self, key: torch.Tensor, value: torch.Tensor, *, trust_unversioned: bool) -> Look:
        """Compare at the beginning of a call.

        Args:
            trust_unversioned: take inference-mode tensors to be written by compiled code only.
        """
        versioned = _has_versions(key, value)
        known = versioned or trust_unversioned
        if known and self._seen == observe(key, value, versioned):
            self._copies = 0
            return Look.SAME
        self._copies += 1
        if known and self._copies <= MAX_CONSECUTIVE_COPIES:
            self.note = ""
            return Look.CHANGED
        self.note = CHANGED_TOO_OFTEN if known else COPIED_AT_EACH_CALL
        return Look.CHANGED_AGAIN

    def remember(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Take the pair as a call left it."""
        self._seen = observe(key, value, _has_versions(key, value))


def _has_versions(key: torch.Tensor, value: torch.Tensor) -> bool:
    return not (key.is_inference() or value.is_inference())
