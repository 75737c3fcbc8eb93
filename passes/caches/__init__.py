"""The kinds of KV cache that the passes know, one module each; :mod:`.kind` says what a kind is."""

from __future__ import annotations

from .cropped import CROPPED
from .dynamic import DYNAMIC
from .kind import CacheKind
from .latent_dynamic import LATENT_DYNAMIC
from .latent_static import LATENT_STATIC
from .packed import LOSSLESS, PACKED
from .read_only import READ_ONLY
from .sliding import SLIDING
from .static import STATIC

KINDS: tuple[CacheKind, ...] = (
    PACKED,
    LOSSLESS,
    SLIDING,
    STATIC,
    DYNAMIC,
    CROPPED,
    READ_ONLY,
    LATENT_STATIC,
    LATENT_DYNAMIC,
)
"""In the order in which they are asked whether an operand of attention is theirs."""
