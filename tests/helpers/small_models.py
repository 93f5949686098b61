"""Configurations of any class of transformers, made small."""

from __future__ import annotations

import re
from typing import Any

from transformers import PretrainedConfig

VOCABULARY = 96
# What attributes of configurations are set to, by the first pattern that matches the whole name.
SIZES: list[tuple[str, Any]] = [
    (r"(text_)?vocab_size(_per_layer_input)?", VOCABULARY),
    (r"pad_token_id", 0),
    (r"bos_token_id|decoder_start_token_id", 1),
    (r"eos_token_id", 2),
    (r"(mlp|moe|shared_expert|dense|expert)?_?(intermediate|ffn|mlp)_(size|dim|hidden_size)(_mlp)?", 48),
    (r"(encoder|decoder)_ffn_dim|ffn_hidden_size|d_ff|dim_ff|d_inner|n_inner|ffn_dim|moe_intermediate_size", 48),
    (r"moe_shared_expert_intermediate_size|shared_expert_intermediate_size|shared_intermediate_size", 48),
    (
        r"hidden_size|d_model|n_embd|model_dim|embedding_size|emb_dim|word_embed_proj_dim|lru_width|attention_hidden_size|"
        r"embed_dim|cross_attention_hidden_size",
        32,
    ),
    (r"num_(hidden_|encoder_|decoder_)?layers|n_layers?|(encoder|decoder)_layers|num_blocks", 2),
    (r"num_(key_value|kv)_heads|num_attention_groups|n_head_kv|num_key_value_groups", 2),
    (r"(num_|n_|encoder_|decoder_)?(attention_)?heads?|num_(encoder|decoder)_attention_heads|num_query_heads", 4),
    (r"(attention_)?head_dim|head_size|kv_channels|v_head_dim|qk_nope_head_dim|d_kv", 8),
    (r"qk_rope_head_dim|rotary_dim", 4),
    (r"hidden_size_per_layer_input|linear_head_dim|mamba_d_head|mamba_head_dim|mamba_n_heads", 8),
    (r"(pronunciation|shape)_(embed_dim|vocab_size)", 32),
    (r"qk_head_dim", 12),
    (r"q_lora_rank|kv_lora_rank|o_lora_rank", 8),
    (r"(num|n)_(local_|routed_)?experts|moe_num_experts", 4),
    (r"num_experts_per_tok|moe_k|moe_topk|num_experts_per_token|top_k_experts", 2),
    (r"n_shared_experts|num_shared_experts", 1),
    (r"n_group|topk_group", 1),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|max_sequence_length|seq_length|max_seq_length", 64),
    (r"(mamba_)?chunk_size", 16),
    (r"mamba_d_state|state_size|ssm_state_size|d_state", 8),
]


def small(config: PretrainedConfig) -> dict[str, Any]:
    """Return arguments that make a configuration small."""
    changes: dict[str, Any] = {}
    for name, value in vars(config).items():
        if isinstance(value, PretrainedConfig):
            changes[name] = {"model_type": value.model_type, **small(value)}
            continue
        if isinstance(value, (list, tuple)) and name in ("layer_types", "mlp_layer_types"):
            changes[name] = list(value)[:2]
        for pattern, size in SIZES:
            if (
                re.fullmatch(pattern, name)
                and (isinstance(value, int) or value is None)
                and not isinstance(value, bool)
            ):
                if value is not None or "token_id" in name or name == "head_dim":
                    changes[name] = size
                break
    if "kv_lora_rank" in vars(config):
        changes.update(num_key_value_heads=4, head_dim=4)
    if changes.get("layer_types") and changes["layer_types"][-1] != vars(config)["layer_types"][-1]:
        changes["layer_types"][1] = vars(config)["layer_types"][-1]
    return {**changes, **OTHERS.get(type(config).__name__, {})}


OTHERS: dict[str, dict[str, Any]] = {
    "FalconH1Config": {"mamba_d_ssm": 64},
    "Mamba2Config": {"num_heads": 8},
    "GPTNeoConfig": {"attention_types": [[["global", "local"], 1]]},
    "Gemma4AssistantConfig": {},
    "NemotronConfig": {"num_key_value_heads": 2},
    "ZayaConfig": {"num_experts_per_tok": 1},
    "DeepseekV2Config": {"num_experts_per_tok": 2},
    "Dots1Config": {
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
    },
    "ZambaConfig": {"num_hidden_layers": 3},
    "Zamba2Config": {"layer_types": ["mamba", "hybrid"]},
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"]},
    "XLNetConfig": {"attn_type": "uni"},
    "Gemma3nTextConfig": {
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 8,
        "activation_sparsity_pattern": [0.0, 0.0],
    },
    "Qwen4ExpTextConfig": {
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
    },
    "Qwen4ExpConfig": {},
    "NemotronHConfig": {"chunk_size": 16},
    "BambaConfig": {"mamba_chunk_size": 16},
    "DbrxConfig": {
        "attn_config": {"kv_n_heads": 2},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "BltConfig": {"encoder_hash_byte_group_vocab": 64},
    "CohereCompassTextConfig": {"layer_types": ["sliding_attention", "sliding_attention"]},
    "ReformerConfig": {"axial_pos_embds": False},
    "XmodConfig": {"default_language": "en_XX"},
}


def small_config(config_class: type[PretrainedConfig], **more: Any) -> PretrainedConfig:
    """A configuration of a causal language model with few and small layers."""
    plain = config_class()
    causal: dict[str, Any] = {name: True for name in ("is_decoder", "causal") if getattr(plain, name, None) is False}
    return config_class(**{**small(plain), **causal, **more})
