"""``tinymoe`` and ``tinydense``: what they are trained on and how they are judged, kept in the cache as
transformers folders with a manifest.

``<cache>/models/<name>/<key>/model`` has config.json, safetensors, the tokenizer and manifest.json. Shape letters:
N tokens, B windows, T tokens of one window.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ...contracts import Metric, Series, plain
from ..models import substream
from ..models.cache import make_once
from ..models.hf import HuggingFaceModel
from ..models.hf_config import weights_sha256
from ..quality.passage import token_bytes
from ..tiny_plugins import TinyMoE
from . import corpus, experts, tokenizer
from .judge import Judgement, judge
from .language import LanguageModelTask, Windows, encode, take_windows
from .trainer import Trainer

WATCHED = 48
"""Held-out windows that are judged while the model is trained."""


class TinyMoEJob:
    """The training of one TinyMoE, from text to the folder in the cache."""

    def __init__(self, params: TinyMoE, device: str) -> None:
        self.params, self.device = params, device
        self.identity, self.folder = params.identity(), params.home()
        self.settings = replace(params.sizes.training, seed=params.seed)
        self.corpus = corpus.load(params.data)
        self.tokenizer = tokenizer.train(self.corpus.training, params.sizes.vocabulary)
        self.ids_N = encode(self.tokenizer, self.corpus.training.content)
        self.held_out_N = encode(self.tokenizer, self.corpus.held_out.content)
        sizes = params.sizes
        self.task = LanguageModelTask(
            new_model(params),
            self.ids_N,
            self._windows(WATCHED),
            (sizes.windows, sizes.window),
            self.tokenizer.bos_token_id,
            params.seed,
            device,
        )

    def _windows(self, count: int) -> Windows:
        sizes = token_bytes(self.tokenizer, self.held_out_N)
        return take_windows(self.held_out_N, sizes, min(count, self.params.sizes.judged), self.params.sizes.window)

    def finish(self, trainer: Trainer) -> tuple[list[Metric], list[Series]]:
        """Judge the model, write its folder where there is none yet, and return the figures."""
        self.task.model.eval()
        judged = self._windows(self.params.sizes.judged)
        untrained = new_model(self.params).to(self.device).eval()
        found = judge(
            self.task.model, untrained, self.tokenizer, self.ids_N, judged, self.task.held_out, self.params.seed
        )
        make_once(self.folder / "model", lambda target: self._write(target, trainer, found))
        return found.metrics(), found.series()

    def _write(self, target: Path, trainer: Trainer, found: Judgement) -> None:
        self.task.model.set_experts_implementation("eager")
        self.task.model.save_pretrained(target)
        self.tokenizer.save_pretrained(target)
        text = json.dumps(self._manifest(target, trainer, found), indent=1)
        (target / "manifest.json").write_text(text, encoding="utf-8")

    def _manifest(self, target: Path, trainer: Trainer, found: Judgement) -> dict[str, Any]:
        import tokenizers
        import transformers

        texts = {"training": (self.corpus.training, self.ids_N), "held_out": (self.corpus.held_out, self.held_out_N)}
        return {
            "params": plain(self.params),
            "sizes": plain(self.params.sizes),
            "config": self.params.config(),
            "identity": self.identity,
            "weights_sha256": weights_sha256(target),
            "parameters": sum(p.numel() for p in self.task.model.parameters()),
            "steps": trainer.step,
            "trained_tokens": trainer.step * self.params.step_tokens,
            "device": self.device,
            "threads": torch.get_num_threads(),
            "texts": {
                name: {"sources": text.sources, "sha256": text.sha256, "tokens": len(ids_N)}
                for name, (text, ids_N) in texts.items()
            },
            "figures": {metric.name: metric.value for metric in found.metrics()},
            "versions": {
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "tokenizers": tokenizers.__version__,
            },
        }


def new_model(params: TinyMoE) -> Any:
    """Return the untrained model, float32, the same for the same seed."""
    from transformers import AutoConfig, AutoModelForCausalLM

    own = {name: value for name, value in params.config().items() if name != "model_type"}
    config = AutoConfig.for_model(params.config()["model_type"], **own)
    torch.manual_seed(substream(params.seed, "initial weights"))
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, experts_implementation=experts.register())


def prepare(params: TinyMoE, device: str) -> TinyMoEJob:
    """Return the training of a TinyMoE."""
    return TinyMoEJob(params, device)


def build(params: TinyMoE) -> HuggingFaceModel:
    """Return the trained model as a source of layers."""
    return HuggingFaceModel(params, params.name)
