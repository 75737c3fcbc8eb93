"""A growing cache of 8-bit floats with no scale: a saturating cast, as vLLM's ``kv_cache_dtype="fp8"``."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Cache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer


class RoundedLayer(DynamicLayer):
    """Stores rows in ``storage``, gives them back in their own dtype."""

    def __init__(self, storage: torch.dtype) -> None:
        super().__init__()
        self.storage = storage

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.keys = key_states.new_empty(0, dtype=self.storage)
        self.values = value_states.new_empty(0, dtype=self.storage)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append ``[B, H, n, D]`` rows; all rows, as the model reads them. The first call's come back as they were given, as
        those of ``QuantizedCache``: a prefill attends to K and V at hand."""
        first = not self.is_initialized
        if first:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._append(self.keys, key_states)
        self.values = self._append(self.values, value_states)
        if first:
            return key_states, value_states
        return self.keys.to(key_states.dtype), self.values.to(value_states.dtype)

    def _append(self, held: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        top = torch.finfo(self.storage).max
        rounded = rows.clamp(-top, top).to(self.storage)
        return torch.cat([held, rounded], -2) if held.numel() else rounded


def rounded_cache(config: PreTrainedConfig, storage: torch.dtype) -> Cache:
    """An empty cache for a model of full-attention layers."""
    layers = config.get_text_config(decoder=True).num_hidden_layers
    return Cache(layers=[RoundedLayer(storage) for _ in range(layers)])
