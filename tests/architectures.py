"""Small random models of the families that mlx-lm opens, for what has to hold whatever the architecture.

model = build("gemma2")
"""

import importlib

import models.fast_blas  # noqa: F401  (before mlx)

import mlx.core as mx
import mlx.nn as nn

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
HEADS = {"head_dim": 8, "query_pre_attn_scalar": 8}
# Name -> family and settings. They differ in where the output layer lies, and in what becomes of the logits after it.
ARCHITECTURES: dict[str, tuple[str, dict]] = {
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-untied": ("llama", {"tie_word_embeddings": False}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"tie_word_embeddings": False, "head_dim": 8}),
    "gemma2": ("gemma2", {**HEADS, "final_logit_softcapping": 3.0}),
    "gemma3": ("gemma3_text", {**HEADS, "sliding_window": 16, "sliding_window_pattern": 2}),
    "granite": (
        "granite",
        {
            "logits_scaling": 8.0,
            "attention_multiplier": 0.1,
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.2,
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": True,
        },
    ),
    "cohere": ("cohere", {"logit_scale": 0.25, "use_qk_norm": False}),
    "phi3": ("phi3", {}),
    "gpt_neox": (
        "gpt_neox",
        {"rotary_emb_base": 10000, "rotary_pct": 0.25, "use_parallel_residual": True},
    ),
    "gpt2": (  # its table of positions is the larger one
        "gpt2",
        {"n_ctx": 128, "n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 128, "layer_norm_epsilon": 1e-5},
    ),
    "starcoder2": ("starcoder2", {"norm_epsilon": 1e-5, "tie_word_embeddings": True}),
    "internlm2": ("internlm2", {}),
    "jamba": (
        "jamba",
        {
            "attn_layer_offset": 1,
            "attn_layer_period": 2,
            "expert_layer_offset": 1,
            "expert_layer_period": 2,
            "mamba_d_conv": 4,
            "mamba_d_state": 4,
            "mamba_expand": 2,
            "mamba_dt_rank": 4,
            "num_experts": 1,
            "num_experts_per_tok": 1,
        },
    ),
    "mamba": (
        "mamba",
        {"state_size": 4, "conv_kernel": 4, "use_bias": False, "use_conv_bias": True, "time_step_rank": 4},
    ),
}


def build(name: str, seed: int = 0, **settings) -> nn.Module:
    """A model of `ARCHITECTURES` with random weights, in eval mode as mlx-lm's `load` leaves it."""
    family, own = ARCHITECTURES[name]
    module = importlib.import_module(f"mlx_lm.models.{family}")
    mx.random.seed(seed)
    model = module.Model(module.ModelArgs.from_dict({**COMMON, "model_type": family, **own, **settings}))
    model.eval()
    mx.eval(model.parameters())
    return model
