"""Tiny transformers models with random weights, for tests: ``load_file(... / "tiny_models.py").build("Olmoe")``."""

import torch
import transformers

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "num_hidden_layers": 3,
}
MODELS = {
    "Olmoe": {"intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 3},
    "Mixtral": {"intermediate_size": 24, "num_local_experts": 8, "num_experts_per_tok": 2},
    "Qwen3Moe": {
        "moe_intermediate_size": 24,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "head_dim": 8,
        "norm_topk_prob": True,
    },
    "DeepseekV3": {
        **LATENT,
        "moe_intermediate_size": 24,
        "intermediate_size": 48,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "num_mtp_layers": 0,
    },
    "GraniteMoe": {"intermediate_size": 24, "num_local_experts": 8, "num_experts_per_tok": 3},
}
"""The architectures that backends and routers are put into, by transformers' class names."""


def build(family, experts="eager", attention=None, **changes):
    """The model of a family, the same at every call; ``experts`` and ``attention`` name implementations."""
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **MODELS.get(family, {}), **changes})
    torch.manual_seed(0)
    own = {} if attention is None else {"attn_implementation": attention}
    cls = getattr(transformers, f"{family}ForCausalLM")
    return cls._from_config(config, experts_implementation=experts, **own).eval()
