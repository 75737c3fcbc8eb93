"""Models with an encoder in front: cross-attention caches, and prompts that begin with an image."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
from twins import CACHES, Twins, prompt, slow, tiny

ENCODER_DECODERS = {"t5": "T5ForConditionalGeneration", "bart": "BartForConditionalGeneration"}


@pytest.mark.parametrize(
    ("model_type", "cache"),
    [
        ("t5", "dynamic"),
        pytest.param("bart", "static", marks=slow),
        pytest.param("t5", "static", marks=slow),
        pytest.param("bart", "dynamic", marks=slow),
    ],
)
def test_an_encoder_decoder_reads_both_caches(model_type: str, cache: str) -> None:
    twins = Twins(tiny(ENCODER_DECODERS[model_type], model_type))
    twins.generate(input_ids=prompt(9), max_new_tokens=6, **CACHES[cache])
    for _ in twins.backend.each():
        assert twins.backend.rewritten >= 2 * 2 * 4
        assert not twins.backend.declined


def test_beams_of_an_encoder_decoder_reorder_both_caches() -> None:
    twins = Twins(tiny("BartForConditionalGeneration", "bart"))
    twins.generate(input_ids=prompt(9), num_beams=3, max_new_tokens=6)
    assert not twins.backend.declined


@slow
def test_candidates_of_an_encoder_decoder_are_cropped_from_its_own_cache_only() -> None:
    twins = Twins(tiny("T5ForConditionalGeneration", "t5"))
    twins.generate(input_ids=prompt(6, batch=1).repeat(1, 2), prompt_lookup_num_tokens=3, max_new_tokens=8)
    assert not twins.backend.declined


@slow
def test_speech_in_whisper() -> None:
    model = tiny("WhisperForConditionalGeneration", "whisper")
    rows = 2 * model.config.max_source_positions
    sound = torch.randn(2, model.config.num_mel_bins, rows, generator=torch.Generator().manual_seed(1))
    twins = Twins(model)
    twins.generate(input_features=sound, max_new_tokens=6)
    assert not twins.backend.declined


def llava(model: Any) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(1, 3, 56, 56), "image_tokens": torch.tensor(16)}


def smolvlm(model: Any) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(1, 1, 3, 56, 56), "image_tokens": torch.tensor(16 // model.config.scale_factor**2)}


def qwen2_vl(model: Any) -> dict[str, torch.Tensor]:
    return {
        "pixel_values": torch.randn(16, 3 * 2 * 14 * 14),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "image_tokens": torch.tensor(4),
    }


VISION = {
    "llava": ("LlavaForConditionalGeneration", llava),
    "smolvlm": ("SmolVLMForConditionalGeneration", smolvlm),
    "qwen2_vl": ("Qwen2VLForConditionalGeneration", qwen2_vl),
}


@pytest.mark.parametrize(
    ("model_type", "cache"),
    [
        ("qwen2_vl", "dynamic"),
        pytest.param("llava", "static", marks=slow),
        pytest.param("qwen2_vl", "static", marks=slow),
        pytest.param("llava", "dynamic", marks=slow),
        pytest.param("smolvlm", "static", marks=slow),
        pytest.param("smolvlm", "dynamic", marks=slow),
    ],
)
def test_a_prompt_with_an_image(model_type: str, cache: str) -> None:
    """The image comes with the prompt only; decoding goes on over the rows that its tokens left in the cache."""
    name, inputs_of = VISION[model_type]
    model = tiny(name, model_type)
    torch.manual_seed(0)
    inputs = inputs_of(model)
    image = model.config.image_token_id
    tokens = torch.full((1, int(inputs.pop("image_tokens"))), image)
    tokens = torch.cat([prompt(3, batch=1), tokens, prompt(5, batch=1, seed=6)], 1)
    if model_type == "qwen2_vl":
        inputs["mm_token_type_ids"] = (tokens == image).long()
    twins = Twins(model)
    twins.generate(input_ids=tokens, suppress_tokens=[image], max_new_tokens=6, **inputs, **CACHES[cache])
    for _ in twins.backend.each():
        assert twins.backend.rewritten == 2 * 5
        assert not twins.backend.declined
