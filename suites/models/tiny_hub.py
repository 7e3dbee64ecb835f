"""Tiny random models of hub architectures as transformers folders. Shape letters: V tokens, H hidden, E experts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from ..hub_plugins import TinyHub
from . import substream
from .hf import HuggingFaceModel


def build(params: TinyHub) -> HuggingFaceModel:
    """Return the model; it is written into the cache when something is first asked for."""
    return HuggingFaceModel(params, params.name)


def write(params: TinyHub, folder: Path) -> None:
    """Write configuration, seeded weights and the tokenizer of bytes."""
    from transformers import AutoConfig, AutoModelForCausalLM

    own = {name: value for name, value in params.config().items() if name != "model_type"}
    config = AutoConfig.for_model(params.kind, **own)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    seed_weights(model, params.seed)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


@torch.no_grad()
def seed_weights(model: Any, seed: int) -> None:
    """Fill every matrix with seeded normal numbers, each from a stream of its own name; norms stay as they are.

    std is 1 / sqrt(fan-in), 1 for embeddings, and 0.1 for selection biases, which zeros would leave untested.
    """
    tensors = [*model.named_parameters(), *model.named_buffers()]
    for name, tensor in tensors:
        rng = torch.Generator().manual_seed(substream(seed, "tiny", name))
        if name.endswith("e_score_correction_bias"):
            tensor.normal_(0.0, 0.1, generator=rng)
        elif name.endswith("embed_tokens.weight"):
            tensor.normal_(0.0, 1.0, generator=rng)
        elif tensor.dim() >= 2:
            tensor.normal_(0.0, 1 / math.sqrt(tensor.shape[-1]), generator=rng)


def byte_tokenizer() -> Any:
    """Return a tokenizer whose tokens are the 256 bytes, in the alphabet of byte-level BPE."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)
