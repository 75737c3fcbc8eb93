"""What a model's layers put into a cache, found by running the model: on the ``meta`` device, where nothing is allocated.

Formulas over config fields would be wrong for one architecture or the other: latents, layers that share a cache, head
dimensions that differ between layers, states of linear attention. One token through the real modules shows what each layer's
cache is given.
"""

from __future__ import annotations

import importlib.util
import inspect
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..demo.model import INSTALL_EXTRA, DemoUnavailableError, find_weights
from .errors import CapacityError

SMOLLM2 = "smollm2"
"""Name of the demo's model."""
DTYPES = {
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
    "fp32": torch.float32,
    "float32": torch.float32,
}
"""Of K and V, by the names that the command takes."""


@dataclass(frozen=True)
class LayerShape:
    """What one layer of the cache is given.

    Attributes:
        key: ``[B, H, 1, Dk]`` on the meta device, None for a layer without K and V.
        value: ``[B, H, 1, Dv]``, likewise.
        constant: bytes that do not grow with the tokens: states of linear attention.
    """

    key: torch.Tensor | None
    value: torch.Tensor | None
    constant: int


@dataclass(frozen=True)
class ModelShape:
    """What a model puts into its cache.

    Attributes:
        config: of its language part.
        name: what to call it in tables.
        batch, dtype: sequences, and the dtype of K and V.
        layers: one entry per layer of its cache.
        weights: bytes of its parameters.
        positions: tokens that it was made for, None where the config does not say.
    """

    config: Any
    name: str
    batch: int
    dtype: torch.dtype
    layers: tuple[LayerShape, ...]
    weights: int
    positions: int | None


def load_config(source: str) -> Any:
    """The config of a causal language model: the language part of a multimodal one.

    Args:
        source: :data:`SMOLLM2`, the path of a ``config.json`` or of a folder or ``.gguf`` file, or a Hugging Face name.

    Raises:
        CapacityError: ``transformers`` is missing, or it cannot read the config; the message is its own.
    """
    if importlib.util.find_spec("transformers") is None:
        raise CapacityError(f"this needs 'transformers'; install it with: {INSTALL_EXTRA}")
    from transformers import AutoConfig

    try:
        path = find_weights() if source == SMOLLM2 else Path(source)
        if path.suffix == ".gguf":
            config = AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name)
        else:
            config = AutoConfig.from_pretrained(source)
    except DemoUnavailableError as error:
        raise CapacityError(str(error)) from None
    except (OSError, ValueError, KeyError) as error:
        raise CapacityError(f"transformers cannot read a config from {source!r}: {error}") from error
    return config.get_text_config(decoder=True)


@torch.no_grad()
def find_shapes(config: Any, name: str, dtype: torch.dtype, batch: int) -> ModelShape:
    """Run one token of ``batch`` sequences through the model of ``config`` on the meta device.

    Raises:
        CapacityError: there is no such model, it cannot run there, or it takes no ``DynamicCache``.
    """
    from transformers import AutoModelForCausalLM, DynamicCache

    logger = logging.getLogger("transformers")  # it advises on fast kernels, of which none is run
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
            token = torch.zeros(batch, 1, dtype=torch.int64)
        cache = DynamicCache(config=config)
        # Models of the Mamba family have another name for it.
        name_of_cache = "cache_params" if "cache_params" in inspect.signature(model.forward).parameters else "past_key_values"
        model(input_ids=token, **{name_of_cache: cache})
    except Exception as error:
        raise CapacityError(f"cannot run a {type(config).__name__} without weights: {type(error).__name__}: {error}") from error
    finally:
        logger.setLevel(level)
    layers = tuple(map(_shape, cache.layers))
    if all(layer.key is None and layer.constant == 0 for layer in layers):
        raise CapacityError(f"a {type(model).__name__} put nothing into the cache that it was given")
    weights = sum(weight.nbytes for weight in model.parameters())
    positions = getattr(config, "max_position_embeddings", None)
    return ModelShape(config, name, batch, dtype, layers, weights, positions)


def _shape(layer: Any) -> LayerShape:
    key, value = getattr(layer, "keys", None), getattr(layer, "values", None)
    if not isinstance(key, torch.Tensor) or not isinstance(value, torch.Tensor):
        key = value = None
    return LayerShape(key, value, sum(tensor.nbytes for tensor in state_tensors(layer)))


def state_tensors(layer: Any) -> list[torch.Tensor]:
    """The convolution and recurrent states of a layer of linear attention."""
    states = [state for name in ("conv_states", "recurrent_states") for state in getattr(layer, name, {}).values()]
    return [state for state in states if isinstance(state, torch.Tensor)]
