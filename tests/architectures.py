"""Small random models of mlx-lm's families, for properties that hold for every architecture.

model = build("gemma2")
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.utils import _get_classes

VOCABULARY = 50
COMMON = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "rms_norm_eps": 1e-5,
    "layer_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 128,
}
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
HEADS = {"head_dim": 8, "query_pre_attn_scalar": 8}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True, "decoder_sparse_step": 1}
GRANITE = {
    "logits_scaling": 8.0,
    "attention_multiplier": 0.1,
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.2,
    "attention_bias": False,
    "mlp_bias": False,
}
MAMBA = {"mamba_d_conv": 4, "mamba_d_state": 4, "mamba_expand": 2}
LINEAR_ATTENTION = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 2,
}
# Name -> family and settings. They differ in the place of the output layer and in post-processing of the logits.
ARCHITECTURES: dict[str, tuple[str, dict]] = {
    "llama-tied": ("llama", TIED),
    "llama-untied": ("llama", UNTIED),
    "llama-biases": ("llama", {**UNTIED, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", UNTIED),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2": ("qwen2", TIED),  # its queries, keys and values have biases
    "qwen2-untied": ("qwen2", UNTIED),
    "qwen3": ("qwen3", {**UNTIED, "head_dim": 8}),
    "qwen3-tied": ("qwen3", {**TIED, "head_dim": 8}),
    "qwen3_moe": ("qwen3_moe", {**EXPERTS, **UNTIED, "num_experts": 4, "mlp_only_layers": [], "head_dim": 8}),
    "gemma": ("gemma", {"head_dim": 8}),
    "gemma2": ("gemma2", {**HEADS, "final_logit_softcapping": 3.0}),
    "gemma3": ("gemma3_text", {**HEADS, "sliding_window": 16, "sliding_window_pattern": 2}),
    "granite": ("granite", {**GRANITE, **TIED}),
    "granite-untied": ("granite", {**GRANITE, **UNTIED}),
    "cohere": ("cohere", {"logit_scale": 0.25, "use_qk_norm": False}),
    "olmo2": ("olmo2", UNTIED),
    "olmo2-tied": ("olmo2", TIED),
    "smollm3": ("smollm3", {**TIED, "no_rope_layers": [1, 0]}),
    "smollm3-untied": ("smollm3", {**UNTIED, "no_rope_layers": [1, 0]}),
    "phi": ("phi", {"partial_rotary_factor": 0.5}),  # every layer has a bias, the output layer too
    "phi3": ("phi3", {}),
    "phi3-tied": ("phi3", TIED),
    "gpt_neox": (
        "gpt_neox",
        {"rotary_emb_base": 10000, "rotary_pct": 0.25, "use_parallel_residual": True},
    ),
    "gpt2": (  # its table of positions is the larger one
        "gpt2",
        {"n_ctx": 128, "n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 128, "layer_norm_epsilon": 1e-5},
    ),
    "gpt_bigcode": (
        "gpt_bigcode",
        {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 128, "n_inner": 64, "layer_norm_epsilon": 1e-5},
    ),
    "starcoder2": ("starcoder2", {"norm_epsilon": 1e-5, **TIED}),
    "internlm2": ("internlm2", {}),
    "minicpm": ("minicpm", {"dim_model_base": 16, "scale_depth": 1.4, "scale_emb": 12, **UNTIED}),
    # Multiplies by its embedding table without calling it:
    "seed_oss-tied": ("seed_oss", {**TIED, "head_dim": 8, "attention_bias": False, "attention_out_bias": False}),
    # Recurrent layers, alone or combined with attention:
    "jamba": (
        "jamba",
        {
            **MAMBA,
            "attn_layer_offset": 1,
            "attn_layer_period": 2,
            "expert_layer_offset": 1,
            "expert_layer_period": 2,
            "mamba_dt_rank": 4,
            "num_experts": 1,
            "num_experts_per_tok": 1,
        },
    ),
    "mamba": (
        "mamba",
        {"state_size": 4, "conv_kernel": 4, "use_bias": False, "use_conv_bias": True, "time_step_rank": 4},
    ),
    "mamba2": (
        "mamba2",
        {
            "num_heads": 8,
            "head_dim": 8,
            "state_size": 4,
            "conv_kernel": 4,
            "n_groups": 1,
            "use_bias": False,
            "use_conv_bias": True,
            "expand": 2,
            "chunk_size": 16,
            "time_step_limit": (0.001, 10.0),
            "time_step_rank": 4,
            "layer_norm_epsilon": 1e-5,
            **UNTIED,
        },
    ),
    "falcon_h1": ("falcon_h1", UNTIED),
    "granitemoehybrid": (
        "granitemoehybrid",
        {
            **GRANITE,
            **TIED,
            "layer_types": ["mamba", "attention"],
            "mamba_n_heads": 8,
            "mamba_d_head": 8,
            "mamba_d_state": 4,
            "mamba_d_conv": 4,
            "mamba_n_groups": 1,
            "mamba_proj_bias": False,
            "mamba_conv_bias": True,
            "position_embedding_type": "rope",
        },
    ),
    "lfm2": (
        "lfm2",
        {
            "full_attn_idxs": [1],
            "conv_L_cache": 3,
            "conv_bias": False,
            "norm_eps": 1e-5,
            "block_dim": 32,
            "block_ff_dim": 64,
            "block_multiple_of": 8,
            "block_ffn_dim_multiplier": 1.0,
            "block_auto_adjust_ff_dim": False,
        },
    ),
    "plamo2": ("plamo2", {}),
    "qwen3_5": ("qwen3_5", {"text_config": {**COMMON, **LINEAR_ATTENTION, **UNTIED, "model_type": "qwen3_5_text"}}),
    "qwen3_next": (
        "qwen3_next",
        {
            **EXPERTS,
            **LINEAR_ATTENTION,
            "num_experts": 4,
            "shared_expert_intermediate_size": 32,
            "mlp_only_layers": [],
            "head_dim": 8,
            "partial_rotary_factor": 0.5,
        },
    ),
}


def settings_of(name: str, **settings) -> dict[str, Any]:
    """The config.json of a model of `ARCHITECTURES`; settings: changes to it."""
    family, own = ARCHITECTURES[name]
    config = {**COMMON, "model_type": family, **own, **settings}
    if "text_config" in config:
        config["text_config"] = {**config["text_config"], **settings}
    return config


def build(name: str, seed: int = 0, **settings) -> nn.Module:
    """A model of `ARCHITECTURES` with random weights, in eval mode as mlx-lm's `load` leaves it."""
    config = settings_of(name, **settings)
    model_class, arguments = _get_classes(config)
    mx.random.seed(seed)
    model = model_class(arguments.from_dict(config))
    model.eval()
    mx.eval(model.parameters())
    return model
