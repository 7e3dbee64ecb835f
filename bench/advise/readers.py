"""The weights of a hub model, counted from its configuration alone. Imports no torch.

Facts of the architectures are those of transformers 5's modeling files, besides the layers that only predict further
tokens (``num_nextn_predict_layers``): inference leaves them out, and so do the counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ...contracts import MoebenchError, unknown
from .attention import Bias, Norms, gated_delta, grouped, latent, mamba
from .counts import MOST_LAYERS, Layer, Model, check_sense
from .layers import bias_of, experts_of, layer_of, window_of, with_dense, with_experts

Config = Mapping[str, Any]
LayerReader = Callable[[Config, int], Layer]


def read_model(config: Config) -> Model:
    """Return the counts of the model that a configuration describes.

    Raises MoebenchError where its architecture is not known, or a field is missing or makes no sense.
    """
    kind = str(config.get("model_type"))
    try:
        config = flat(config)
        kind = str(config.get("model_type"))
        if kind not in READERS:
            raise MoebenchError(unknown("MoE architecture (model_type)", kind, READERS))
        return check_sense(_model(config, READERS[kind]))
    except KeyError as error:
        raise MoebenchError(f"the configuration of this {kind} model lacks {error}; fetch config.json again.") from None
    except (AttributeError, TypeError, ValueError, ArithmeticError, IndexError) as error:
        raise MoebenchError(
            f"the configuration of this {kind} model makes no sense ({error}); fetch it again."
        ) from None


def flat(config: Config) -> dict[str, Any]:
    """Return the configuration of the language model, under today's names of transformers where old ones differ."""
    own = dict(config)
    if own.get("model_type") == "llama4":
        own = dict(own["text_config"], model_type="llama4_text")
    if own.get("model_type") == "dbrx":
        attention, ffn = own.get("attn_config") or {}, own.get("ffn_config") or {}
        own |= {"num_key_value_heads": attention.get("kv_n_heads"), "intermediate_size": ffn.get("ffn_hidden_size")}
        own |= {"num_local_experts": ffn.get("moe_num_experts"), "num_experts_per_tok": ffn.get("moe_top_k")}
        renamed = {"d_model": "hidden_size", "n_heads": "num_attention_heads", "n_layers": "num_hidden_layers"}
        own |= {new: own[old] for old, new in renamed.items() if old in own}
    return own


@dataclass(frozen=True)
class Reader:
    """How an architecture is counted: its layers one by one, and what lies around them.

    ``norm``: weights of a norm over H, in multiples of H. ``tied``: whether embedding and head are one where the
    configuration does not say.
    """

    layer: LayerReader
    norm: int = 1
    tied: bool = False


def _model(config: Config, reader: Reader) -> Model:
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    tied = config.get("tie_word_embeddings", reader.tied)
    norms = reader.norm * hidden
    if not 0 < config["num_hidden_layers"] <= MOST_LAYERS:
        raise ValueError(f"it has {config['num_hidden_layers']} layers")
    layers = tuple(reader.layer(config, index) for index in range(config["num_hidden_layers"]))
    layers = tuple(replace(layer, rest=layer.rest + 2 * norms) for layer in layers)
    if min(hidden, vocabulary, len(layers)) < 1 or not any(layer.experts for layer in layers):
        raise ValueError("there are no layers with experts")
    head = 0 if tied else hidden * vocabulary
    head += vocabulary * bool(config.get("lm_head_bias"))
    longest = config.get("max_position_embeddings") or config.get("max_seq_len")
    return Model(config["model_type"], hidden, vocabulary, layers, hidden * vocabulary, head, norms, longest)


def _plain(norms: Norms = "", router_bias: bool = False) -> LayerReader:
    """Every layer has experts of intermediate_size; shared ones where the configuration has them."""

    def read(config: Config, index: int) -> Layer:
        attention = grouped(config, bias_of(config, "qkvo"), norms)
        layer = layer_of(attention, window_of(config, index))
        shared = config.get("shared_intermediate_size") or 0
        return with_experts(layer, config, config["intermediate_size"], shared, router_bias)

    return read


def _qwen(config: Config, index: int) -> Layer:
    """Qwen2-MoE and Qwen3-MoE: some layers may be dense; the former has a shared expert with a gate."""
    old = config["model_type"] == "qwen2_moe"
    bias: Bias = bias_of(config, "qkvo")
    if old:
        bias = "qkv" if config.get("qkv_bias", True) else ""
    window = window_of(config, index) if config.get("use_sliding_window") else None
    return _qwen_ffn(config, index, layer_of(grouped(config, bias, "" if old else "head"), window))


def _qwen_ffn(config: Config, index: int, layer: Layer) -> Layer:
    sparse = (index + 1) % config.get("decoder_sparse_step", 1) == 0
    if not sparse or index in (config.get("mlp_only_layers") or ()):
        return with_dense(layer, config, config["intermediate_size"])
    shared = config.get("shared_expert_intermediate_size") or 0
    layer = with_experts(layer, config, config["moe_intermediate_size"], shared)
    return replace(layer, shared=layer.shared + (config["hidden_size"] if shared else 0))


def _qwen_next(config: Config, index: int) -> Layer:
    kinds, step = config.get("layer_types"), config.get("full_attention_interval", 4)
    full = kinds[index] == "full_attention" if kinds else (index + 1) % step == 0
    attention = grouped(config, bias_of(config, "qkvo"), "head", gated=True) if full else gated_delta(config)
    return _qwen_ffn(config, index, layer_of(attention))


def _deepseek_ffn(layer: Layer, config: Config, index: int, router_bias: bool) -> Layer:
    if index < config.get("first_k_dense_replace", 0):
        return with_dense(layer, config, config["intermediate_size"])
    width = config["moe_intermediate_size"]
    return with_experts(layer, config, width, (config.get("n_shared_experts") or 0) * width, router_bias)


def _deepseek(router_bias: bool) -> LayerReader:
    """DeepSeek-V2 and V3: latent attention, dense layers first, shared experts."""

    def read(config: Config, index: int) -> Layer:
        return _deepseek_ffn(layer_of(latent(config)), config, index, router_bias)

    return read


def _glm(config: Config, index: int) -> Layer:
    norms: Norms = "head" if config.get("use_qk_norm") else ""
    return _deepseek_ffn(layer_of(grouped(config, bias_of(config, "qkv"), norms)), config, index, True)


def _dots(config: Config, index: int) -> Layer:
    layer = layer_of(grouped(config, bias_of(config, "qkvo"), "head"), window_of(config, index))
    return _deepseek_ffn(layer, config, index, True)


def _gpt_oss(config: Config, index: int) -> Layer:
    """Biases everywhere; every second layer looks back on a window."""
    kinds = config.get("layer_types") or ("sliding_attention", "full_attention") * config["num_hidden_layers"]
    window = window_of({**config, "layer_types": kinds}, index)
    bias: Bias = "qkvo" if config.get("attention_bias", True) else ""
    hidden, width = config["hidden_size"], config["intermediate_size"]
    layer = layer_of(grouped(config, bias, sinks=True), window)
    return with_experts(layer, config, width, router_bias=True, expert_bias=2 * width + hidden)


def _llama4(config: Config, index: int) -> Layer:
    step, layers = config["interleave_moe_layer_step"], config["num_hidden_layers"]
    chosen = config.get("moe_layers") or range(step - 1, layers, step)
    no_rope = config.get("no_rope_layer_interval", 4)
    kinds = config.get("layer_types") or [
        "chunked_attention" if (place + 1) % no_rope else "full_attention" for place in range(layers)
    ]
    window = window_of({**config, "layer_types": kinds}, index, "chunked_attention")
    layer = layer_of(grouped(config, bias_of(config, "qkvo")), window)
    if index not in chosen:
        return with_dense(layer, config, config["intermediate_size_mlp"])
    return with_experts(layer, config, config["intermediate_size"], config["intermediate_size"])


def _ernie(config: Config, index: int) -> Layer:
    bias: Bias = "qkvo" if config.get("use_bias") else ""
    layer, hidden = layer_of(grouped(config, bias)), config["hidden_size"]
    start, end = config["moe_layer_start_index"], config.get("moe_layer_end_index", -1)
    end = config["num_hidden_layers"] - 1 if end == -1 else end
    if not (start <= index <= end and (index + 1) % config.get("moe_layer_interval", 1) == 0):
        width = config["intermediate_size"]
        return with_dense(layer, config, width, (2 * width + hidden) * bool(bias))
    width = config["moe_intermediate_size"]
    shared = width * (config.get("moe_num_shared_experts") or 0)
    layer = with_experts(layer, config, width, shared, router_bias=True)
    return replace(layer, shared=layer.shared + (2 * shared + hidden) * bool(bias and shared))


def _jamba(config: Config, index: int) -> Layer:
    period, offset = config["attn_layer_period"], config["attn_layer_offset"]
    layer = layer_of(grouped(config) if index % period == offset else mamba(config))
    period, offset = config["expert_layer_period"], config["expert_layer_offset"]
    if index % period == offset and experts_of(config) > 1:
        return with_experts(layer, config, config["intermediate_size"])
    return with_dense(layer, config, config["intermediate_size"])


READERS: Mapping[str, Reader] = {
    "dbrx": Reader(_plain()),
    "deepseek_v2": Reader(_deepseek(False)),
    "deepseek_v3": Reader(_deepseek(True)),
    "dots1": Reader(_dots),
    "ernie4_5_moe": Reader(_ernie, tied=True),
    "flex_olmo": Reader(_plain(norms="whole")),
    "glm4_moe": Reader(_glm),
    "gpt_oss": Reader(_gpt_oss),
    "granitemoe": Reader(_plain()),
    "granitemoeshared": Reader(_plain()),
    "jamba": Reader(_jamba),
    "kimi_k2": Reader(_deepseek(True)),
    "llama4_text": Reader(_llama4),
    "minimax_m2": Reader(_plain(norms="whole", router_bias=True)),
    "mixtral": Reader(_plain()),
    "olmoe": Reader(_plain(norms="whole")),
    "phimoe": Reader(_plain(), norm=2),
    "qwen2_moe": Reader(_qwen),
    "qwen3_moe": Reader(_qwen),
    "qwen3_next": Reader(_qwen_next),
}
"""What can be counted, by ``model_type``."""
