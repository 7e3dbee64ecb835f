"""``tinymoe`` and ``tinydense``: small language models that are trained here. Imports no torch.

Both are a Qwen2-MoE of transformers, the format of that family whose MoE layers have a shared expert, and whose layers
may be dense.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from ..contracts import Descriptor, MoebenchError, Selection, make_key
from ..moe.shapes import ModelShape
from .models import cache_dir
from .plugins import LayerSuite
from .training.settings import Settings

VERSION = 1
"""Counted up where the same parameters would give another model."""


@dataclass(frozen=True)
class Variant:
    """Sizes of a model and of its training: ``windows`` of ``window`` tokens a step."""

    vocabulary: int
    hidden: int
    depth: int
    heads: int
    experts: int
    k: int
    width: int
    shared: int
    windows: int
    window: int
    training: Settings
    judged: int
    """Held-out windows of the last evaluation."""


def _variant(steps: int, warmup: int, judged: int) -> Variant:
    training = Settings(steps, 4e-3, warmup, final=0.02, evaluate_every=500, checkpoint_every=250)
    return Variant(2048, 128, 4, 4, 16, 2, 128, 128, windows=4, window=256, training=training, judged=judged)


SMOKE = Settings(12, 3e-3, 2, evaluate_every=6, checkpoint_every=4)

VARIANTS: Mapping[str, Variant] = {
    "standard": _variant(4000, 200, 256),
    "short": _variant(500, 100, 96),
    "smoke": Variant(512, 32, 2, 2, 4, 2, 16, 16, windows=2, window=64, training=SMOKE, judged=8),
}


@dataclass(frozen=True)
class TinyMoE:
    """A language model of 4 layers with 16 experts, 2 for each token, beside a shared one; 3.9 million parameters.

    Trained by `moebench models train tinymoe` on the shipped calibration text, or on the text file ``data``. Variant
    ``short`` has fewer steps, ``smoke`` is made in seconds and says nothing of text.
    """

    variant: Literal["standard", "short", "smoke"] = "standard"
    data: str = ""
    seed: int = 0

    name: ClassVar[str] = "tinymoe"
    recorded: ClassVar[bool] = True
    trainer: ClassVar[str] = "moebench.suites.training.tinymoe:prepare"
    """What trains it, for suite ``pretraining``."""
    AXES: ClassVar[Mapping[str, Any]] = {"traffic": ["recorded"]}

    @property
    def sizes(self) -> Variant:
        """The sizes of the variant."""
        return VARIANTS[self.variant]

    @property
    def calibration_tokens(self) -> int:
        """Tokens recorded for calibration: each expert should read many more than it has channels."""
        return 1024 if self.variant == "smoke" else 16384

    @property
    def step_tokens(self) -> int:
        """Tokens of one step of training."""
        return self.sizes.windows * self.sizes.window

    def config(self) -> dict[str, Any]:
        """Return the architecture's configuration, as config.json has it."""
        own = self.sizes
        return {
            "model_type": "qwen2_moe",
            "vocab_size": own.vocabulary,
            "hidden_size": own.hidden,
            "intermediate_size": own.width,
            "moe_intermediate_size": own.width,
            "shared_expert_intermediate_size": own.shared,
            "num_hidden_layers": own.depth,
            "num_attention_heads": own.heads,
            "num_key_value_heads": own.heads,
            "num_experts": own.experts,
            "num_experts_per_tok": own.k,
            "norm_topk_prob": True,
            "hidden_act": "silu",
            "max_position_embeddings": own.window,
            "tie_word_embeddings": True,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "pad_token_id": 0,
        }

    def shape(self) -> ModelShape:
        """Return the sizes of the MoE layers."""
        from .models.hf_config import shape_of

        return shape_of(self.config())

    def identity(self) -> str:
        """Return the hash of all that decides the training, texts included."""
        from .training.corpus import load

        corpus = load(self.data)
        texts = [corpus.training.sha256, corpus.held_out.sha256]
        return make_key([VERSION, self.sizes, self.config(), texts, self.seed])

    def home(self) -> Path:
        """Return where the cache keeps the model, its checkpoints while it is trained, and what is made of it."""
        return cache_dir() / "models" / self.name / self.identity()[:16]

    def folder(self) -> Path:
        """Return the transformers folder; MoebenchError where it was not trained yet."""
        folder = self.home() / "model"
        if not folder.is_dir():
            own = [f"{name}={getattr(self, name)}" for name in ("variant", "data", "seed") if self._changed(name)]
            command = " ".join(["moebench models train", self.name, *own])
            raise MoebenchError(f"model '{self.name}' is not trained here; run `{command}`.")
        return folder

    def _changed(self, name: str) -> bool:
        return bool(getattr(self, name) != getattr(type(self), name))

    def manifest(self) -> dict[str, Any]:
        """Return what the model's folder says of how it was made and what came of it."""
        found: dict[str, Any] = json.loads((self.folder() / "manifest.json").read_text(encoding="utf-8"))
        return found

    def weights_sha256(self) -> str:
        """Return one hash of the weights; MoebenchError where it was not trained yet."""
        from .models.hf_config import weights_sha256

        return weights_sha256(self.folder())

    def base(self) -> str:
        """Return nothing: the weights are as they were trained."""
        return ""

    def missing(self) -> str | None:
        """Return a sentence where transformers is not installed, or the model was not trained yet."""
        if importlib.util.find_spec("transformers") is None:
            return f"model '{self.name}' needs transformers; run pip install 'moebench[models]'."
        try:
            self.folder()
        except MoebenchError as error:
            return str(error)
        return None


@dataclass(frozen=True)
class TinyDense(TinyMoE):
    """The same language model with one FFN in the place of a layer's experts, four times as wide as they; 1.3 million
    parameters. For what makes experts of a dense model: ``split``, ``taylor``, and distillation into experts.

    Trained by `moebench models train tinydense`, with the variants of ``tinymoe``.
    """

    name: ClassVar[str] = "tinydense"
    AXES: ClassVar[Mapping[str, Any]] = {"structure": ["split"], "traffic": ["recorded"]}

    @property
    def width(self) -> int:
        """Channels of an FFN."""
        return 4 * self.sizes.width

    def config(self) -> dict[str, Any]:
        """Return the architecture's configuration: every layer is one of those that hold no experts."""
        layers = list(range(self.sizes.depth))
        return {**super().config(), "intermediate_size": self.width, "mlp_only_layers": layers}

    def shape(self) -> ModelShape:
        """Return the sizes of the dense layers."""
        own = self.sizes
        return ModelShape(own.hidden, self.width, 0, own.depth, tuple(range(own.depth)), Selection("one", 1, False))


@dataclass(frozen=True)
class Pretraining:
    """A model is trained, with its curves; what came of it is kept in the cache. The model says what of."""

    AXES: ClassVar[Mapping[str, Any]] = {**LayerSuite.AXES, "model": ["tinymoe"]}


DESCRIPTORS = [
    Descriptor(
        "model",
        "tinymoe",
        "a small MoE language model, trained here on shipped text",
        "moebench.suites.training.tinymoe:build",
        TinyMoE,
        requires=("transformers",),
    ),
    Descriptor(
        "model",
        "tinydense",
        "tinymoe with one FFN in the place of a layer's experts",
        "moebench.suites.training.tinymoe:build",
        TinyDense,
        requires=("transformers",),
    ),
    Descriptor(
        "suite", "pretraining", "a model's training, with its curves", "moebench.suites.pretraining:create", Pretraining
    ),
]
