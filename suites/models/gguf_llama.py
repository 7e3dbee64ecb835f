"""A whole GGUF model under transformers' names, decoded to float32. Shape letters: E experts, F width, H hidden.

transformers reads such files too, but needs accelerate and twice the time; a test compares both.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...contracts import MoebenchError
from ...moe.blocks.gguf import read_dense
from ...moe.blocks.gguf_file import GgufFile
from ...moe.blocks.gguf_types import open_file
from .gguf_config import architecture_of, read_config

CONVERTER = 2
"""Raised whenever the same file gives other weights or another configuration than before: folders are known by it."""

NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.gate_up_proj",
    "ffn_down_exps": "mlp.experts.down_proj",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
"""Tensors of one block in GGUF and in transformers, whose models hold the experts of a layer in two tensors."""

GLOBAL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def as_transformers(path: Path) -> dict[str, Tensor]:
    """Return every tensor of the file under transformers' names, float32; MoebenchError for one that is unknown."""
    file = open_file(path)
    config, paired = read_config(file), architecture_of(file).paired
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]} if paired else {}
    state = {}
    for name in file.tensors:
        if name in GLOBAL_NAMES:
            state[GLOBAL_NAMES[name]] = read_dense(path, name)
        elif not name.endswith(".ffn_up_exps.weight"):  # goes with gate
            own, tensor = _block_tensor(file, name, heads)
            state[own] = tensor
    return state


def _block_tensor(file: GgufFile, name: str, heads: dict[str, int]) -> tuple[str, Tensor]:
    """Return one tensor of a block and transformers' name for it.

    GGUF keeps rotary pairs of ``heads`` side by side; transformers wants the two halves of a head apart.
    """
    parts = name.split(".")
    if len(parts) != 4 or parts[0] != "blk" or parts[2] not in NAMES or parts[3] not in ("weight", "bias"):
        raise MoebenchError(f"{file.path} has a tensor {name!r} that is not carried over; use the model's folder.")
    _, index, part, kind = parts
    tensor, own = read_dense(file.path, name), f"model.layers.{index}.{NAMES[part]}"
    if part in heads:
        tensor = _halves(tensor, heads[part])
    elif part == "ffn_gate_exps":
        tensor = torch.cat([tensor, read_dense(file.path, name.replace("gate", "up"))], dim=1)
    elif part == "ffn_gate_inp_shexp":
        tensor = tensor.reshape(1, -1)
    return (own if part in ("ffn_gate_exps", "ffn_down_exps") else f"{own}.{kind}"), tensor


def _halves(tensor: Tensor, heads: int) -> Tensor:
    """Return rows (head, pair, side) as (head, side, pair)."""
    return tensor.reshape(heads, -1, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def transformers_config(path: Path, special: dict[str, Any]) -> Any:
    """Return transformers' configuration of the file's model; ``special`` are the ids of its tokenizer."""
    from transformers import AutoConfig

    config = read_config(open_file(path))
    return AutoConfig.for_model(config.pop("model_type"), **config, **special, dtype="float32")
