"""What the metadata of a GGUF file says of its model, as transformers' configuration has it. Imports no torch.

Facts of the architectures are those of llama.cpp and of transformers 5.23: whether the weights of the chosen experts
sum to one is in llama.cpp's graphs and not in the files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
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
        raise MoebenchError(f"{file.path}: {unknown('GGUF architecture', str(name), ARCHITECTURES)}")
    if int(file.metadata.get("split.count", 0)) > 1:
        raise MoebenchError(f"{file.path} is one of several parts; join them with llama-gguf-split --merge first.")
    own = ARCHITECTURES[name]
    kind = own.experts if _number(file, "expert_count", 0) else own.dense
    if not kind:
        raise MoebenchError(f"{file.path}: architecture {name} without its experts is not known; convert it again.")
    return own


def model_type(file: GgufFile) -> str:
    """Return transformers' name of the file's architecture."""
    own = architecture_of(file)
    return own.experts if _number(file, "expert_count", 0) else own.dense


def experts_of(file: GgufFile) -> int:
    """Return the number of experts of a layer, 0 for a dense model."""
    return int(_number(file, "expert_count", 0))


def read_config(file: GgufFile) -> dict[str, Any]:
    """Return the configuration of the whole model by transformers' names; MoebenchError for what cannot be carried."""
    own, heads = architecture_of(file), _number(file, "attention.head_count")
    hidden = _number(file, "embedding_length")
    config: dict[str, Any] = {
        "model_type": model_type(file),
        "vocab_size": file.place("token_embd.weight").dims[-1],
        "hidden_size": hidden,
        "intermediate_size": _number(file, "feed_forward_length"),
        "num_hidden_layers": _number(file, "block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": _number(file, "attention.head_count_kv", heads),
        "head_dim": _number(file, "attention.key_length", hidden // heads),
        "max_position_embeddings": _number(file, "context_length"),
        "rms_norm_eps": _number(file, "attention.layer_norm_rms_epsilon"),
        "rope_parameters": {"rope_type": "default", "rope_theta": _number(file, "rope.freq_base", 10000.0)},
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "hidden_act": "silu",
    }
    if experts_of(file):
        config |= _expert_config(file, config["model_type"], dict(own.fixed or {}))
    return config


def _expert_config(file: GgufFile, kind: str, fixed: dict[str, Any]) -> dict[str, Any]:
    experts, width = experts_of(file), _number(file, "expert_feed_forward_length", 0)
    name = "num_local_experts" if kind == "mixtral" else "num_experts"
    config = {**fixed, name: experts, "num_experts_per_tok": _number(file, "expert_used_count")}
    if kind in ("mixtral", "olmoe"):
        config["intermediate_size"] = width or _number(file, "feed_forward_length")
    else:
        config["moe_intermediate_size"] = width or _first_width(file)
    if kind == "qwen2_moe":
        config["shared_expert_intermediate_size"] = _number(file, "expert_shared_feed_forward_length")
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
        found = file.place(name).dims
        if found != dims:
            raise MoebenchError(
                f"{file.path}: '{name}' is {found} and not {dims} as the metadata say; convert it again."
            )


def check_whole(file: GgufFile) -> None:
    """Raise MoebenchError where the layers around the FFNs are not what transformers' model would make of them."""
    scaling = file.metadata.get(f"{file.metadata['general.architecture']}.rope.scaling.type", "none")
    if "rope_freqs.weight" in file.tensors or scaling != "none":
        raise MoebenchError(
            f"{file.path} scales its rotary embedding, which is not carried over; use axes.traffic=gaussian, or the "
            f"model's folder with model=hf."
        )


_MISSING = object()


def _number(file: GgufFile, name: str, default: Any = _MISSING) -> Any:
    """Return a number of the architecture's own metadata; MoebenchError where it is missing or no single number."""
    key = f"{file.metadata['general.architecture']}.{name}"
    value = file.metadata.get(key, default)
    if value is _MISSING:
        raise MoebenchError(f"{file.path} does not say {key}; convert the model again.")
    if isinstance(value, ArrayOf | str | bool):
        raise MoebenchError(
            f"{file.path}: {key} is not one number, which no architecture known here has; use model=hf."
        )
    return value
