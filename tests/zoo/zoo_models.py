"""A tiny model of any generative class, with weights under which attention matters, and what to call it with."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, DynamicCache, EncoderDecoderCache, StaticCache
from transformers.modeling_outputs import BaseModelOutput
from zoo_classes import ZooClass
from zoo_overrides import AFTER_BUILDING, INPUTS, PARTS, override
from zoo_rules import HIDDEN
from zoo_shrink import shrink

SEED = 20260
BATCH = 2
CACHES = ("static", "dynamic")
CAPACITY = 20
"""Rows of a static cache."""
ENCODED_ROWS = 9
"""Rows that an encoder-decoder's cross-attention reads."""
TEXT_TOKENS = (3, 80)
"""Tokens are drawn from here: no special ones, none that stands for an image."""


@dataclass
class _Encoded(BaseModelOutput):
    """What any encoder returns: some decoders look for more than hidden states."""

    attention_mask: torch.Tensor | None = None
    router_logits: tuple[torch.Tensor, ...] | None = None


@dataclass(frozen=True)
class TinyModel:
    """A model and how it is called.

    Attributes:
        module: in eval mode.
        model_type: of its configuration.
        encoded: ``[B, ENCODED_ROWS, HIDDEN]``, the encoder's output, or None for a decoder alone.
    """

    module: Any
    model_type: str
    encoded: torch.Tensor | None

    def to(self, dtype: torch.dtype) -> TinyModel:
        """A copy in another dtype, with the same numbers as far as the dtype has them."""
        encoded = None if self.encoded is None else self.encoded.to(dtype)
        return TinyModel(copy.deepcopy(self.module).to(dtype), self.model_type, encoded)

    def new_cache(self, kind: str) -> Any:
        """An empty cache as ``generate`` would make it; ``kind`` is one of :data:`CACHES`."""
        config = self.module.config.get_text_config(decoder=True)

        def one(rows: int) -> Any:
            return StaticCache(config=config, max_cache_len=rows) if kind == "static" else DynamicCache(config=config)

        return one(CAPACITY) if self.encoded is None else EncoderDecoderCache(one(CAPACITY), one(ENCODED_ROWS))

    def inputs(self, tokens: torch.Tensor) -> dict[str, Any]:
        """Keyword arguments of the model for tokens int64 ``[B, S]``, but for the cache."""
        if self.model_type in INPUTS:
            inputs: dict[str, Any] = dict(INPUTS[self.model_type](tokens, self.module))
        else:
            inputs = {"input_ids" if self.encoded is None else "decoder_input_ids": tokens}
        if self.encoded is not None:
            inputs["encoder_outputs"] = _Encoded(last_hidden_state=self.encoded)
        return inputs


def tiny_config(entry: ZooClass) -> Any:
    """The default configuration of a class, shrunk."""
    config_class = CONFIG_MAPPING[entry.model_type]
    of_class = getattr(transformers, entry.name).config_class if entry.name else config_class
    if not issubclass(config_class, of_class):  # a text model that is listed under the whole of which it is a part
        config_class = of_class
    if entry.model_type in PARTS:
        parts = [tiny_config(ZooClass("", model_type, "")) for model_type in PARTS[entry.model_type]]
        return config_class.from_encoder_decoder_configs(*parts)
    values = shrink(config_class().to_dict())
    if entry.group == "causal" and "is_decoder" in values:
        values["is_decoder"] = True
    values.pop("transformers_version", None)
    return config_class.from_dict(override(values))


def tiny_model(entry: ZooClass, dtype: torch.dtype = torch.float32) -> TinyModel:
    """A model with fixed random weights. The same numbers in fp32 whatever ``dtype``, then rounded."""
    config = tiny_config(entry)
    torch.manual_seed(SEED)
    module = getattr(transformers, entry.name)(config).eval().requires_grad_(False)
    if hasattr(module, "set_experts_implementation"):
        module.set_experts_implementation("batched_mm")  # the default knows no float64, and generate decodes with this one
    AFTER_BUILDING.get(entry.model_type, lambda _: None)(module)
    _randomise(module, torch.Generator().manual_seed(SEED))
    encoded = None
    if module.config.is_encoder_decoder:
        encoded = torch.randn(BATCH, ENCODED_ROWS, HIDDEN, generator=torch.Generator().manual_seed(SEED + 1))
    model = TinyModel(module.float(), entry.model_type, encoded)
    return model if dtype is torch.float32 else model.to(dtype)


def random_tokens(count: int) -> torch.Tensor:
    """Int64 ``[BATCH, count]``, the same at each call."""
    return torch.randint(*TEXT_TOKENS, (BATCH, count), generator=torch.Generator().manual_seed(SEED + 2))


def _randomise(module: torch.nn.Module, generator: torch.Generator) -> None:
    """Weights that keep the scale of what they multiply, and no vector of zeros.

    With the usual initialisation, 0.02 times a normal number, all scores of so small a model are nearly equal and attention
    adds almost nothing to the residual: a wrong key would not show. Gates, sinks and biases start at zero and hide theirs.
    """
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() < 2:
            parameter.add_(0.1 * noise)
        else:
            fan_in = parameter.shape[-1] if parameter.dim() == 2 else max(parameter.shape[1:])
            parameter.copy_(noise * fan_in**-0.5)
