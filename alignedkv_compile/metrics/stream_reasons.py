"""Short names, for labels, of the notes that say why a layer's planes were stale."""

from __future__ import annotations

from collections.abc import Mapping

from ..state.append_buffers import EXCHANGED_TOO_OFTEN
from ..state.copies import CHANGED_TOO_OFTEN, COPIED_AT_EACH_CALL
from ..state.sidecar import NO_VERSION_COUNTER, REBUILD_FAILED, REBUILT_TOO_OFTEN

STREAM_REASONS: Mapping[str, tuple[str, ...]] = {
    "no-version-counter": (NO_VERSION_COUNTER, COPIED_AT_EACH_CALL),
    "written-too-often": (REBUILT_TOO_OFTEN, CHANGED_TOO_OFTEN),
    "exchanged-too-often": (EXCHANGED_TOO_OFTEN,),
    "rebuild-failed": (REBUILD_FAILED,),
}
"""Label -> what the notes begin with."""
OTHER = "other"


def reason_label(note: str) -> str:
    """The label of a note of :class:`~alignedkv_compile.report.GraphReport`."""
    return next((label for label, beginnings in STREAM_REASONS.items() if note.startswith(beginnings)), OTHER)
