"""Tiny random versions of hub architectures, built by transformers itself, with a tokenizer of bytes. No torch here.

They have all that a downloaded model has - configuration, safetensors, tokenizer, transformers' own code around the MoE
layers - so that whatever works on them works on a real one, and no more: what they say of text is noise.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar

from ..contracts import Descriptor, MoebenchError, make_key
from ..moe.shapes import ModelShape
from .models import cache_dir

VOCABULARY = 256
"""Tokens: the bytes."""

HEADS = 4


@dataclass(frozen=True)
class TinyHub:
    """Random weights by ``seed`` in a hub architecture; ``width`` is that of one expert.

    The weights are normal with standard deviation 1 / sqrt(fan-in), embeddings with 1, selection biases with 0.1.
    """

    hidden: int = 64
    width: int = 32
    experts: int = 8
    k: int = 2
    depth: int = 4
    seed: int = 0

    recorded: ClassVar[bool] = True
    name: ClassVar[str] = ""
    kind: ClassVar[str] = ""
    own: ClassVar[Mapping[str, Any]] = {}
    """What the architecture's configuration has besides sizes."""

    def __post_init__(self) -> None:
        if min(self.width, self.experts, self.depth) < 1 or not 0 < self.k <= self.experts:
            raise ValueError("width, experts and depth must be positive, and k lie between 1 and experts.")
        if self.hidden < 1 or self.hidden % (2 * HEADS):
            raise ValueError(f"hidden={self.hidden} must be a multiple of {2 * HEADS}.")

    def config(self) -> dict[str, Any]:
        """Return the architecture's configuration, as config.json has it."""
        return {
            "model_type": self.kind,
            "vocab_size": VOCABULARY,
            "hidden_size": self.hidden,
            "intermediate_size": self.width,
            "moe_intermediate_size": self.width,
            "num_hidden_layers": self.depth,
            "num_attention_heads": HEADS,
            "num_key_value_heads": HEADS,
            "num_experts_per_tok": self.k,
            "hidden_act": "silu",
            "max_position_embeddings": 4096,
            "tie_word_embeddings": False,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
            **self.own,
            **self.counts(),
        }

    def counts(self) -> dict[str, int]:
        """Return the number of experts under the name that the architecture has for it."""
        return {"num_experts": self.experts}

    def shape(self) -> ModelShape:
        """Return the sizes of the MoE layers."""
        from .models.hf_config import shape_of

        return shape_of(self.config())

    def weights_sha256(self) -> str:
        """Return ``seeded:`` and the hash of all that decides the weights: transformers names the tensors."""
        return "seeded:" + make_key([self.name, self, self.config(), _version("transformers")])

    def base(self) -> str:
        """Return nothing: the weights were never stored in another form."""
        return ""

    def missing(self) -> str | None:
        """Return a sentence where transformers is not installed, or knows no such configuration."""
        if importlib.util.find_spec("transformers") is None:
            return f"model '{self.name}' needs transformers; run pip install 'moebench[models]'."
        try:
            self.shape()
        except MoebenchError as error:
            return str(error)
        return None

    def home(self) -> Path:
        """Return where the cache keeps the model."""
        return cache_dir() / "models" / self.name / self.weights_sha256()[-16:]

    def folder(self) -> Path:
        """Return the transformers folder, made where it is not there."""
        from .models.cache import make_once
        from .models.tiny_hub import write

        return make_once(self.home() / "model", lambda aside: write(self, aside))


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


@dataclass(frozen=True)
class TinyOlmoe(TinyHub):
    """OLMoE: top-k of softmax, not renormalised; attention with normed queries and keys. Otherwise as ``TinyHub``."""

    name: ClassVar[str] = "tiny-olmoe"
    kind: ClassVar[str] = "olmoe"
    own: ClassVar[Mapping[str, Any]] = {"norm_topk_prob": False}


@dataclass(frozen=True)
class TinyMixtral(TinyHub):
    """Mixtral: top-k of softmax, renormalised. Otherwise as ``TinyHub``."""

    name: ClassVar[str] = "tiny-mixtral"
    kind: ClassVar[str] = "mixtral"

    def counts(self) -> dict[str, int]:
        """Return the number of experts by Mixtral's name."""
        return {"num_local_experts": self.experts}


@dataclass(frozen=True)
class TinyQwen3(TinyHub):
    """Qwen3-MoE: top-k of softmax, renormalised, one dense layer among the others. Otherwise as ``TinyHub``."""

    name: ClassVar[str] = "tiny-qwen3-moe"
    kind: ClassVar[str] = "qwen3_moe"
    own: ClassVar[Mapping[str, Any]] = {"norm_topk_prob": True, "head_dim": 16, "mlp_only_layers": [1]}


@dataclass(frozen=True)
class TinyDeepSeek(TinyHub):
    """DeepSeek-V3: sigmoid scores, biased selection of the best 2 of 4 groups, a shared expert, latent attention.

    The first layer is dense. Otherwise as ``TinyHub``.
    """

    name: ClassVar[str] = "tiny-deepseek-v3"
    kind: ClassVar[str] = "deepseek_v3"
    own: ClassVar[Mapping[str, Any]] = {
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "n_group": 4,
        "topk_group": 2,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.experts % 4 or self.experts < 8 or self.k > self.experts // 2:
            raise ValueError(f"experts={self.experts} must be 8, 12, ... in 4 groups, and k at most half of them.")
        if self.depth < 2:
            raise ValueError("the first layer is dense; ask for a depth of 2 at least.")

    def counts(self) -> dict[str, int]:
        """Return the number of experts by DeepSeek's name."""
        return {"n_routed_experts": self.experts}


MODELS: tuple[type[TinyHub], ...] = (TinyOlmoe, TinyMixtral, TinyQwen3, TinyDeepSeek)

DESCRIPTORS = [
    Descriptor(
        "model",
        model.name,
        f"a tiny random {model.kind} of transformers, with text in bytes",
        "moebench.suites.models.tiny_hub:build",
        model,
        requires=("transformers",),
    )
    for model in MODELS
]
