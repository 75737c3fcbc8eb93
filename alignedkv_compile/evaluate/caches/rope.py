"""Longer contexts than a model was trained to: YaRN (Peng et al., arXiv 2309.00071), through the model's config.

YaRN divides the frequencies of the rotary embedding that are slower than the trained context, and sharpens attention a
little. With no training on top, a model stretched like this is a worse one than at its own lengths: perplexities of stretched
contexts compare caches with each other, not contexts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import EvaluationError


def stretch_factor(rows: int, trained: int) -> float:
    """By what YaRN stretches ``trained`` positions for ``rows``: 1 when they fit, else the next whole number."""
    return float(math.ceil(rows / trained))


@contextmanager
def stretched(model: Any, factor: float) -> Iterator[None]:
    """While inside, ``model`` has YaRN with ``factor``; 1 changes nothing.

    Raises:
        EvaluationError: the model has no plain rotary embedding whose config can be changed.
    """
    if factor == 1.0:
        yield
        return
    config = model.config.get_text_config()
    inner = getattr(model, "base_model", model)
    before, rotary = getattr(config, "rope_parameters", None), getattr(inner, "rotary_emb", None)
    if rotary is None or not before or before.get("rope_type", "default") != "default":
        raise EvaluationError(
            f"{type(model).__name__} has no plain rotary embedding to stretch with YaRN; choose contexts up to"
            f" {config.max_position_embeddings} rows"
        )
    trained = config.max_position_embeddings
    config.rope_parameters = {**before, "rope_type": "yarn", "factor": factor, "original_max_position_embeddings": trained}
    config.max_position_embeddings = int(trained * factor)
    inner.rotary_emb = type(rotary)(config=config)
    try:
        yield
    finally:
        config.rope_parameters, config.max_position_embeddings = before, trained
        inner.rotary_emb = rotary
