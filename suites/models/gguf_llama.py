"""Llama-like models in GGUF files: tensors as float32, and the whole model as transformers names it.

transformers reads such files too, but needs accelerate and twice the time; a test compares both.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...contracts import MoebenchError

NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""Tensors of one block in GGUF and in transformers."""

GLOBAL_NAMES = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}


def _reader(file: Path) -> Any:
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise MoebenchError("reading a GGUF file needs gguf; run pip install 'moebench[models]'.") from error
    return GGUFReader(file)


def read_tensors(file: Path, names: Collection[str] | None = None) -> dict[str, Tensor]:
    """Return tensors of the file by GGUF name, dequantized to float32; all of them where no names are given."""
    from gguf.quants import dequantize

    found = {
        tensor.name: torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).astype("float32"))
        for tensor in _reader(file).tensors
        if names is None or tensor.name in names
    }
    for name in names or ():
        if name not in found:
            raise MoebenchError(f"{file} has no tensor '{name}'; fetch the model again.")
    return found


def read_config(file: Path) -> dict[str, Any]:
    """Return the arguments of transformers' LlamaConfig that the file tells."""
    fields = _reader(file).fields
    read = {name.removeprefix("llama."): fields[name].contents() for name in fields if name.startswith("llama.")}
    return {
        "vocab_size": read["vocab_size"],
        "hidden_size": read["embedding_length"],
        "intermediate_size": read["feed_forward_length"],
        "num_hidden_layers": read["block_count"],
        "num_attention_heads": read["attention.head_count"],
        "num_key_value_heads": read["attention.head_count_kv"],
        "max_position_embeddings": read["context_length"],
        "rms_norm_eps": read["attention.layer_norm_rms_epsilon"],
        "rope_parameters": {"rope_type": "default", "rope_theta": read["rope.freq_base"]},
        "tie_word_embeddings": True,
    }


def as_transformers(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of a whole model with tied embeddings under transformers' names.

    GGUF keeps the rows of q and k with rotary pairs side by side; transformers wants the two halves of a head apart.
    """
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    state = {}
    for name, tensor in tensors.items():
        if name in GLOBAL_NAMES:
            state[GLOBAL_NAMES[name]] = tensor
            continue
        _, index, part, _ = name.split(".")
        state[f"model.layers.{index}.{NAMES[part]}.weight"] = _halves(tensor, heads[part]) if part in heads else tensor
    return state


def _halves(weight: Tensor, heads: int) -> Tensor:
    """Return rows (head, pair, side) as (head, side, pair)."""
    return weight.reshape(heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
