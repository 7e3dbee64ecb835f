"""Weights and kept values of the attentions of hub models. Facts are those of transformers 5's modeling files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Config = Mapping[str, Any]
Bias = Literal["", "qkv", "qkvo"]
Norms = Literal["", "head", "whole"]


@dataclass(frozen=True)
class Attention:
    """Number of weights, of values kept per token, and of values kept per sequence."""

    weights: int
    kv_values: int = 0
    state: int = 0


def grouped(config: Config, bias: Bias = "", norms: Norms = "", sinks: bool = False, gated: bool = False) -> Attention:
    """Grouped-query attention.

    ``bias``: of which projections; ``norms``: of queries and keys, over a head or over all heads; ``sinks``: one logit
    per head; ``gated``: as many gates as queries.
    """
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    dim = config.get("head_dim") or hidden // heads
    q, kv = heads * dim, kv_heads * dim
    weights = hidden * (q * (2 if gated else 1) + 2 * kv + q)
    weights += {"": 0, "qkv": q + 2 * kv, "qkvo": q + 2 * kv + hidden}[bias]
    weights += {"": 0, "head": 2 * dim, "whole": q + kv}[norms]
    return Attention(weights + (heads if sinks else 0), 2 * kv)


def latent(config: Config) -> Attention:
    """Multi-head latent attention (DeepSeek-V2): the latent and one rotary key are kept, and nothing per head."""
    hidden, heads, rank = config["hidden_size"], config["num_attention_heads"], config["kv_lora_rank"]
    nope, rope, value = (config[name] for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    q, bias = heads * (nope + rope), bool(config.get("attention_bias"))
    q_rank = config.get("q_lora_rank")
    weights = q_rank * (hidden + 1 + q) + bias * q_rank if q_rank else hidden * q
    weights += hidden * (rank + rope) + rank + rank * heads * (nope + value) + heads * value * hidden
    return Attention(weights + bias * (rank + rope + hidden), rank + rope)


def mamba(config: Config) -> Attention:
    """Jamba's Mamba block."""
    hidden, states, kernel = config["hidden_size"], config["mamba_d_state"], config["mamba_d_conv"]
    inner = config["mamba_expand"] * hidden
    rank = config["mamba_dt_rank"]
    rank = -(-hidden // 16) if rank == "auto" else rank
    weights = inner * (states + 1 + kernel) + inner * bool(config.get("mamba_conv_bias", True))
    weights += 2 * inner * hidden + inner * (rank + 2 * states) + rank * inner + inner + inner * hidden
    weights += rank + 2 * states  # norms of the step and of both state matrices
    weights += (2 * inner + hidden) * bool(config.get("mamba_proj_bias", False))
    return Attention(weights, state=inner * (kernel + states))


def gated_delta(config: Config) -> Attention:
    """Qwen3-Next's gated delta rule."""
    hidden, kernel = config["hidden_size"], config["linear_conv_kernel_dim"]
    key_dim, value_dim = config["linear_key_head_dim"], config["linear_value_head_dim"]
    heads = config["linear_num_value_heads"]
    keys, values = config["linear_num_key_heads"] * key_dim, heads * value_dim
    mixed = 2 * keys + values
    weights = hidden * (mixed + values) + hidden * 2 * heads + mixed * kernel + 2 * heads + value_dim + values * hidden
    return Attention(weights, state=mixed * kernel + heads * key_dim * value_dim)
