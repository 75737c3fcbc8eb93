"""What single models need beyond the rules: entries that must agree with each other, and inputs of their own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch

DELETE = object()
"""Stands for an entry that must be absent."""

_ROTARY = {"rope_type": "default", "rope_theta": 10000.0}
_MROPE = {"rope_parameters": {**_ROTARY, "mrope_section": [2, 3, 3]}}
_QWEN4_INDEXER = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16}
_HALF_ATTENTION = {"attn_layer_period": 2, "attn_layer_offset": 1}

OVERRIDES: Mapping[str, Mapping[str, Any]] = {
    "bamba": {**_MAMBA, "attn_layer_indices": [1], "layer_types": DELETE},
    "blt": {"encoder_hash_byte_group_vocab": 100, "encoder_hash_byte_group_size": [3, 4]},
    "chameleon": {"vocabulary_map": {"<image>": 111}},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROTARY, "sliding_attention": _ROTARY}},
    "cpmant": {"prompt_length": 4, "prompt_types": 4, "segment_types": 4},
    # All experts for each token: bf16 rounds its router's inputs so that two draws of the same error pick different ones.
    "dbrx": {"attn_config.rope_theta": 10000.0, "attn_config.clip_qkv": 8.0, "ffn_config.moe_top_k": 4},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "deepseek_ocr2_text": {
        "mlp_layer_types": ["dense", "sparse"],
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "dots3_note_text": {
        "per_layer_config": DELETE,
        "head_dim": 24,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 24,
        "swa_kv_lora_rank": 32,
        "swa_head_dim": 24,
        "swa_qk_nope_head_dim": 16,
        "swa_v_head_dim": 12,
        "swa_qk_rope_head_dim": 8,
    },
    "emu3": {"vocabulary_map": {"<image>": 111, "<|extra_200|>": 112}},
    "ernie4_5_vl_moe_text": {"rope_parameters": {**_ROTARY, "mrope_section": [2, 2, 4]}},
    "dots3_note_audio_encoder": {"adapter_out_dim": 64},
    "dots3_note_vision_encoder": {"adapter_in_dim": 64, "adapter_out_dim": 64},
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 128},
    "fun_asr_nano": {"adaptor_config.intermediate_size": 16},
    "gemma4_assistant": {"text_config.hidden_size_per_layer_input": 0},
    "glm4v_moe_text": {"rope_parameters": {**_ROTARY, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 2]}},
    "glm4v_text": _MROPE,
    "glm5_next_text": {"index_kpool": 2},
    "glm_ocr_text": _MROPE,
    "granite4_vision": {"deepstack_layer_map": [], "spatial_target_layers": [], "downsample_rate": "1/2"},
    "granitemoehybrid": {**_MAMBA, "layer_types": ["linear_attention", "full_attention"]},
    "hrm_text": {"num_layers_per_stack": 2, "num_hidden_layers": 16, "H_cycles": 2, "L_cycles": 3},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "hunyuan_vl_text": {"head_dim": 16, **_MROPE},
    "jamba": {
        **_HALF_ATTENTION,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "layer_types": DELETE,
        "layers_block_type": DELETE,
    },
    "kyutai_speech_to_text": {"codec_config.upsample_groups": 64},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "ministral": {"head_dim": 16},
    "mistral4": {"head_dim": 16},
    "mistral_large4_text": {"kv_source_layers": DELETE},
    "molmo2_adapter": {"vision_feature_layer": [1, 0]},
    "moonshine": {"encoder_num_key_value_heads": 4, "decoder_num_key_value_heads": 4},
    "moonshine_streaming": {"num_key_value_heads": 4},
    "nemotron": {"num_key_value_heads": 2},
    "paddleocr_vl_text": _MROPE,
    "qwen2_5_omni_text": _MROPE,
    "qwen2_5_vl_text": _MROPE,
    "qwen2_vl_text": _MROPE,
    "qwen4_exp_text": _QWEN4_INDEXER,
    "recurrent_gemma": {"num_hidden_layers": 3, "layer_types": DELETE},
    "reformer": {"axial_pos_embds_dim": [32, 32], "axial_pos_shape": [8, 16]},
    "step3p5": {"sliding_window": 10},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 5,
        "layers_block_type": ["linear_attention", "linear_attention", "hybrid", "linear_attention", "hybrid"],
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
    },
    "zamba2": {
        "num_hidden_layers": 2,
        "layers_block_type": ["linear_attention", "hybrid"],
        "hybrid_layer_ids": [1],
        "mamba_headdim": 16,
        "n_mamba_heads": 8,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
    },
}
"""By model type: entries of the tiny configuration, dotted where they belong to a subconfiguration."""

PARTS: Mapping[str, tuple[str, str]] = {
    "encoder-decoder": ("bert", "bert"),
    "vision-encoder-decoder": ("vit", "bert"),
    "speech-encoder-decoder": ("wav2vec2", "bert"),
}
"""Encoder and decoder of the classes that join any two models and have no default of their own."""


def _codebooks(tokens: torch.Tensor, model: Any) -> dict[str, torch.Tensor]:
    codebooks = model.config.num_codebooks
    return {"input_ids": tokens.repeat_interleave(codebooks, 0)}


def _channels(tokens: torch.Tensor, model: Any) -> dict[str, torch.Tensor]:
    channels = model.config.decoder_config.num_channels
    return {"decoder_input_ids": tokens[..., None].expand(-1, -1, channels).contiguous()}


def _text_and_codebooks(tokens: torch.Tensor, model: Any) -> dict[str, torch.Tensor]:
    streams = model.config.num_codebooks + 1
    return {"input_ids": tokens[..., None].expand(-1, -1, streams).contiguous()}


INPUTS: Mapping[str, Callable[[torch.Tensor, Any], dict[str, torch.Tensor]]] = {
    "dia": _channels,
    "kyutai_speech_to_text": _text_and_codebooks,
    "musicgen": _codebooks,
    "musicgen_melody": _codebooks,
}
"""By model type: how tokens ``[B, S]`` become the model's inputs, where it is not ``input_ids``."""

AFTER_BUILDING: Mapping[str, Callable[[Any], object]] = {"xmod": lambda model: model.set_default_language("en_XX")}
"""By model type: what must be called once."""


def override(config: dict[str, Any]) -> dict[str, Any]:
    """``config`` with the entries that its model type and those of its subconfigurations need; it is changed in place."""
    for value in config.values():
        if isinstance(value, dict):
            override(value)
    for path, value in OVERRIDES.get(config.get("model_type", ""), {}).items():
        *parents, name = path.split(".")
        place = config
        for parent in parents:
            place = place.setdefault(parent, {})
        if value is DELETE:
            place.pop(name, None)
        else:
            place[name] = copy.deepcopy(value)
    return config
