"""What the metadata of a GGUF file says of its model, as transformers' configuration has it. Imports no torch.

Facts of the architectures are those of llama.cpp and of transformers 5.23: whether the weights of the chosen experts
sum to one is in llama.cpp's graphs and not in the files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from ...contracts import MoebenchError, Selection, unknown
from ...moe.blocks.gguf_file import ArrayOf, GgufFile
from ...moe.shapes import ModelShape
from .hf_config import shape_of


@dataclass(frozen=True)
class Architecture:
    """One of GGUF's architectures: transformers' names for it, dense and with experts, and what sets it apart.

    ``paired``: the rows of q and k lie with rotary pairs side by side. ``fixed`` is configuration that no file holds.
    """

    dense: str = ""
    experts: str = ""
    paired: bool = False
    fixed: Mapping[str, Any] | None = None


ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture("llama", "mixtral", paired=True),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "qwen2moe": Architecture(experts="qwen2_moe", fixed={"norm_topk_prob": False}),
    "qwen3moe": Architecture(experts="qwen3_moe", fixed={"norm_topk_prob": True}),
    "olmoe": Architecture(experts="olmoe", fixed={"norm_topk_prob": False}),
}
"""What can be read, by ``general.architecture``."""

FFN_PARTS = ("ffn_gate", "ffn_up", "ffn_down")

TOKENIZER = "tokenizer.ggml.tokens"


def architecture_of(file: GgufFile) -> Architecture:
    """Return the architecture of a file; MoebenchError where it is unknown, or the file is one of several."""
    name = file.metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise MoebenchError(f"{file.path}: {unknown('GGUF architecture', ascii(name)[1:-1], ARCHITECTURES)}")
    if _count(file, "split.count", 0, default=0) > 1:
        raise MoebenchError(f"{file.path} is one of several parts; join them with llama-gguf-split --merge first.")
    own = ARCHITECTURES[name]
    kind = own.experts if experts_of(file) else own.dense
    if not kind:
        raise MoebenchError(f"{file.path}: architecture {name} without its experts is not known; convert it again.")
    return own


def model_type(file: GgufFile) -> str:
    """Return transformers' name of the file's architecture."""
    own = architecture_of(file)
    return own.experts if experts_of(file) else own.dense


def experts_of(file: GgufFile) -> int:
    """Return the number of experts of a layer, 0 for a dense model."""
    return _own_count(file, "expert_count", 0, default=0)


def read_config(file: GgufFile) -> dict[str, Any]:
    """Return the configuration of the whole model by transformers' names; MoebenchError for what cannot be carried."""
    own, count = architecture_of(file), partial(_own_count, file)
    heads, hidden = count("attention.head_count"), count("embedding_length")
    config: dict[str, Any] = {
        "model_type": model_type(file),
        "vocab_size": file.place("token_embd.weight").dims[-1],
        "hidden_size": hidden,
        "intermediate_size": count("feed_forward_length"),
        "num_hidden_layers": count("block_count", most=len(file.tensors)),
        "num_attention_heads": heads,
        "num_key_value_heads": count("attention.head_count_kv", default=heads),
        "head_dim": count("attention.key_length", default=hidden // heads),
        "max_position_embeddings": count("context_length"),
        "rms_norm_eps": _positive(file, "attention.layer_norm_rms_epsilon"),
        "rope_parameters": {"rope_type": "default", "rope_theta": _positive(file, "rope.freq_base", 10000.0)},
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "hidden_act": "silu",
    }
    if experts_of(file):
        config |= _expert_config(file, config["model_type"], dict(own.fixed or {}))
    return config


def _expert_config(file: GgufFile, kind: str, fixed: dict[str, Any]) -> dict[str, Any]:
    experts, width = experts_of(file), _own_count(file, "expert_feed_forward_length", 0, default=0)
    name = "num_local_experts" if kind == "mixtral" else "num_experts"
    config = {**fixed, name: experts, "num_experts_per_tok": _own_count(file, "expert_used_count", most=experts)}
    if kind in ("mixtral", "olmoe"):
        config["intermediate_size"] = width or _own_count(file, "feed_forward_length")
    else:
        config["moe_intermediate_size"] = width or _first_width(file)
    if kind == "qwen2_moe":
        config["shared_expert_intermediate_size"] = _own_count(file, "expert_shared_feed_forward_length", 0)
    return config


def _first_width(file: GgufFile) -> int:
    """Return the width of an expert as the first layer's tensor has it."""
    return file.place("blk.0.ffn_down_exps.weight").dims[0]


def read_shape(file: GgufFile) -> ModelShape:
    """Return the sizes of the FFNs or MoE layers; MoebenchError where a tensor is missing or of another size."""
    config = read_config(file)
    if experts_of(file):
        shape = shape_of(config)
    else:
        layers = config["num_hidden_layers"]
        dense = Selection("one", 1, False)
        shape = ModelShape(config["hidden_size"], config["intermediate_size"], 0, layers, tuple(range(layers)), dense)
    for layer in shape.moe_layers:
        _check_layer(file, shape, layer)
    return shape


def ffn_names(file: GgufFile, layer: int) -> tuple[str, str, str]:
    """Return the names of gate, up and down of a layer: those of all its experts where it has some."""
    kind = "_exps" if experts_of(file) else ""
    gate, up, down = (f"blk.{layer}.{part}{kind}.weight" for part in FFN_PARTS)
    return gate, up, down


def _check_layer(file: GgufFile, shape: ModelShape, layer: int) -> None:
    experts = (shape.experts,) if shape.experts else ()
    into, out = (shape.hidden, shape.width, *experts), (shape.width, shape.hidden, *experts)
    wanted = dict(zip(ffn_names(file, layer), (into, into, out), strict=True))
    if shape.experts:
        wanted[f"blk.{layer}.ffn_gate_inp.weight"] = (shape.hidden, shape.experts)
    for name, dims in wanted.items():
        _check_dims(file, name, dims)
    biases = sorted(name for name in file.tensors if name.startswith(f"blk.{layer}.ffn_") and name.endswith(".bias"))
    if biases:
        raise MoebenchError(f"{file.path} has {biases[0]!r}, and FFNs here have no biases; use a model without.")


def _check_dims(file: GgufFile, name: str, dims: tuple[int, ...]) -> None:
    found = file.place(name).dims
    if found != dims:
        raise MoebenchError(f"{file.path}: {name!r} is {found} and not {dims} as the metadata say; convert it again.")


def check_whole(file: GgufFile) -> None:
    """Raise MoebenchError where the layers around the FFNs are not what transformers' model would make of them."""
    config = read_config(file)
    head, hidden = config["head_dim"], config["hidden_size"]
    plain = {
        "rope.scaling.type": ("none",),
        "rope.scale_linear": (0.0, 1.0),
        "rope.dimension_count": (head,),
        "attention.value_length": (head,),
        "attention.sliding_window": (0,),
        "attention.clamp_kqv": (0.0,),
    }
    given = {name: file.metadata.get(_key(file, name), values[0]) for name, values in plain.items()}
    odd = [name for name, values in plain.items() if given[name] not in values]
    if "rope_freqs.weight" in file.tensors or odd:
        raise MoebenchError(
            f"{file.path} has {odd[0] if odd else 'rope_freqs'} in its attention, which is not carried over; use "
            f"axes.traffic=gaussian, or the model's folder with model=hf."
        )
    for part, heads in (("q", config["num_attention_heads"]), ("k", config["num_key_value_heads"])):
        _check_dims(file, f"blk.0.attn_{part}.weight", (hidden, heads * head))


_MISSING = object()
MOST = 2**31 - 1
"""No size of a model is larger."""


def _key(file: GgufFile, name: str) -> str:
    """Return the key of the architecture's own metadata."""
    return f"{file.metadata['general.architecture']}.{name}"


def _value(file: GgufFile, key: str, default: Any = _MISSING) -> Any:
    """Return a number of the metadata; MoebenchError where it is missing or no single number."""
    value = file.metadata.get(key, default)
    if value is _MISSING:
        raise MoebenchError(f"{file.path} does not say {key}; convert the model again.")
    if isinstance(value, ArrayOf | str | bool):
        raise MoebenchError(
            f"{file.path}: {key} is not one number, which no architecture known here has; use model=hf."
        )
    return value


def _count(file: GgufFile, key: str, least: int = 1, most: int = MOST, default: Any = _MISSING) -> int:
    """Return a whole number of ``least`` to ``most``; MoebenchError for any other value."""
    value = _value(file, key, default)
    if not isinstance(value, int) or not least <= value <= most:
        raise MoebenchError(f"{file.path}: {key} is {value} and no number of {least} to {most}; convert it again.")
    return value


def _own_count(file: GgufFile, name: str, least: int = 1, most: int = MOST, default: Any = _MISSING) -> int:
    """Return a whole number of the architecture's own metadata."""
    return _count(file, _key(file, name), least, most, default)


def _positive(file: GgufFile, name: str, default: Any = _MISSING) -> float:
    """Return a finite number above 0 of the architecture's own metadata."""
    value = float(_value(file, _key(file, name), default))
    if not 0.0 < value < math.inf:
        raise MoebenchError(f"{file.path}: {_key(file, name)} is {value} and not above 0; convert the model again.")
    return value
