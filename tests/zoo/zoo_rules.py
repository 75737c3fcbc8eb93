"""What "tiny" means, entry by entry of a configuration.

Each rule caps the integer entries whose whole name matches one of its patterns; a smaller default stays. The first rule that
matches decides.
"""

from __future__ import annotations

import re

HIDDEN = 64
HEADS = 4
KV_HEADS = 2
HEAD_DIM = 16
LAYERS = 2
VOCABULARY = 128
POSITIONS = 128
WINDOW = 10
"""Rows of a sliding window or an attention chunk: few enough that decoding fills it."""

_RULES: tuple[tuple[int, str], ...] = (
    (
        HIDDEN,
        "hidden_size d_model n_embd n_embed dim model_dim embed_dim embedding_size embedding_dim emb_dim word_embed_proj_dim"
        " (text|cross|cross_attention|out|output|attention|encoder|decoder|projector|qformer|adapter|input|mm)_hidden_size"
        " (audio|acoustic|semantic|vision)_hidden_size hidden_dim lru_width projection_dim output_dim out_dim"
        " (text|patch)_embed_dim conv_dim_out dim_model input_dim encoder_dim latent_size latent_dim d_embed kv_dim"
        " perceiver_dim output_proj_dims channels bottleneck_dim",
    ),
    (
        HEADS,
        "n_heads? num_heads num_query_heads attn_heads resampler_n_heads attention_num_heads depth_decoder_num_heads"
        " ((en|de)coder_)?attention_heads num_(en|de)coder_heads (.*_)?num_attention_heads num_global_attention_heads"
        " num_(en|de)coder_attention_heads num_cross_attention_heads num_swa_attention_heads",
    ),
    (
        KV_HEADS,
        "(.*_)?num_key_value_heads num_kv_heads n_kv_heads? num_global_key_value_heads multi_query_group_num"
        " num_attention_groups num_kv_groups num_query_groups",
    ),
    (
        HEAD_DIM,
        "head_dim attention_head_size kv_channels d_kv head_size attn_head_dim d_head (.*_)?attention_head_dim dim_head"
        " (global|swa|sliding)_head_dim index_head_dim",
    ),
    (4, "index_n_heads index_num_heads index_heads index_topk index_top_k indexer_topk dsa_topk topk_blocks"),
    (24, "q_lora_rank o_lora_rank qk_head_dim"),
    (32, "kv_lora_rank"),
    (8, "qk_rope_head_dim"),
    (16, "qk_nope_head_dim"),
    (12, "v_head_dim value_head_dim swa_v_head_dim"),
    (
        32,
        "moe_intermediate_size shared_expert_intermediate_size expert_intermediate_size shared_intermediate_size"
        " moe_ffn_hidden_size expert_ffn_hidden_size moe_.*intermediate_size expert_dim expert_ff_dim",
    ),
    (
        96,
        "(.*_)?intermediate_size ((en|de)coder_)?ffn_dim d_ff n_inner ffn_hidden_size mlp_dim feed_forward_proj_dim"
        " intermediate_size_mlp ff_dim feedforward_dim dim_ff block_ff_dim ffn_size dim_feedforward mlp_hidden_size",
    ),
    (
        LAYERS,
        "(.*_)?num_hidden_layers n_layers? num_layers ((en|de)coder_)layers num_(en|de)coder_layers depth num_blocks"
        " num_text_layers num_block_layers n_hidden_layers num_resblocks resampler_depth",
    ),
    (VOCABULARY, "(.*_)?vocab_size vocab_size_per_layer_input codebook_size n_words"),
    (
        POSITIONS,
        "max_position_embeddings n_positions n_ctx max_seq_len(gth)? seq_length max_sequence_length max_length"
        " max_.*_positions ((en|de)coder_)max_position_embeddings max_(en|de)coder_position_embeddings",
    ),
    (4, "(.*_)?num_experts num_local_experts n_routed_experts expert_num num_routed_experts ffn_num_experts"),
    (
        2,
        "num_experts_per_tok(en)? top_?k moe_k moe_top_?k num_selected_experts experts_per_token top_k_experts"
        " num_activated_experts num_topk router_top_k zero_expert_num",
    ),
    (1, "n_group topk_group num_expert_group moe_n_group n_shared_experts num_shared_experts moe_num_shared_experts"),
    (
        WINDOW,
        "sliding_window(_size|_length)? attention_chunk_size (attention_|local_)?window_size chunk_attention_size",
    ),
    (8, "hidden_size_per_layer_input laurel_rank rotary_dim rotary_ndims rope_dim rope_ndims"),
    (2, "altup_num_inputs num_codebooks global_layer_norm_every_n_layers num_memory_blocks attn_module_.*"),
    (1, "first_k_dense_replace num_dense_layers first_dense_layers moe_layer_start_index num_first_dense_layers dense_layers"),
    (8, "mamba_n_heads mamba_num_heads ssm_num_heads"),
    (128, "mamba_d_ssm"),
    (16, "mamba_d_head mamba_head_dim mamba_d_state ssm_state_size state_size d_state mamba_ssm_state_size"),
    (1, "mamba_n_groups mamba_ngroups n_groups"),
    (16, "mamba_chunk_size chunk_size"),
    (4, "mamba_dt_rank time_step_rank"),
    (4, "linear_num_value_heads linear_num_v_heads"),
    (2, "linear_num_key_heads linear_num_k_heads"),
    (16, "linear_key_head_dim linear_value_head_dim linear_head_dim"),
    (56, "image_size input_size img_size"),
    (14, "patch_size"),
    (16, "num_mel_bins n_mels mel_bins feature_size"),
    (1, "decoder_start_token_id first_kv_shared_layer_idx num_kv_shared_layers attn_layer_offset expert_layer_offset"),
    (2, "full_attention_interval full_attn_interval attn_layer_period expert_layer_period"),
    (8, "reduce_dim adaptor_rank adapter_rank time_mix_extra_dim lora_rank"),
    (4, "perceiver_.*latents num_query_tokens n_latents resampler_n_latents num_latents"),
)
_COMPILED = tuple((cap, re.compile("|".join(f"(?:{pattern})" for pattern in names.split()))) for cap, names in _RULES)
_CONVOLUTION = re.compile(r"conv|kernel|stride|dilat")


def cap_of(name: str) -> int | None:
    """The largest value that the entry ``name`` may have, or None for any."""
    if _CONVOLUTION.search(name) and name != "conv_dim_out":
        return None
    return next((cap for cap, pattern in _COMPILED if pattern.fullmatch(name)), None)
