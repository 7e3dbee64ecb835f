"""Decoder layers as configurations of transformers describe them, put together from their parts. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from .attention import Attention, Bias
from .counts import Layer

Config = Mapping[str, Any]


def first(config: Config, *names: str) -> int:
    """Return the first of these fields that the configuration has; KeyError names the first where it has none."""
    for name in names:
        if config.get(name) is not None:
            return int(config[name])
    raise KeyError(names[0])


def experts_of(config: Config) -> int:
    """Return the number of routed experts of a layer."""
    return first(config, "num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


def layer_of(attention: Attention, window: int | None = None) -> Layer:
    """Return a layer that has its attention alone."""
    return Layer(attention.weights, kv_values=attention.kv_values, window=window, state=attention.state)


def with_dense(layer: Layer, config: Config, width: int, bias: int = 0) -> Layer:
    """Return the layer with a gated dense FFN."""
    return replace(layer, dense=3 * config["hidden_size"] * width + bias, width=width)


def with_experts(
    layer: Layer, config: Config, width: int, shared: int = 0, router_bias: bool = False, expert_bias: int = 0
) -> Layer:
    """Return the layer with a router and gated experts of ``width``, and shared ones of ``shared`` together."""
    hidden, experts = config["hidden_size"], experts_of(config)
    k = first(config, "num_experts_per_tok", "moe_k")
    if not 0 < k <= experts:
        raise ValueError(f"{k} of {experts} experts")
    return replace(
        layer,
        shared=3 * hidden * shared,
        expert=3 * hidden * width + expert_bias,
        experts=experts,
        k=k,
        rest=layer.rest + experts * (hidden + router_bias),
        width=k * width + shared,
    )


def bias_of(config: Config, which: Bias) -> Bias:
    """Return which projections have a bias: ``which``, where the configuration says that some have."""
    return which if config.get("attention_bias") else ""


def window_of(config: Config, index: int, kind: str = "sliding_attention") -> int | None:
    """Return how many tokens a layer looks back on, None for all."""
    size = config.get("attention_chunk_size" if kind == "chunked_attention" else "sliding_window")
    kinds = config.get("layer_types")
    return size if size and (kinds is None or kinds[index] == kind) else None
