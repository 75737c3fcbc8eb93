"""A cache for transformers whose storage are the planes: less memory than 16 bits, and nothing beside it."""

from __future__ import annotations

from .cache import Cache as Cache
