"""SmolLM2-135M-Instruct from a GGUF file (Q4_1) on PyPI: one layer at a time, recorded hidden states, whole model.

Everything lies in ``<cache>/models/smollm2/<start of the GGUF's sha256>``: the GGUF file, ``layers/NN.safetensors``
(the FFN, dequantized), ``hidden/<key>/NN.safetensors`` (its inputs on real text) and ``language_model`` (a
transformers folder). All weights are float32, as the GGUF dequantizes.

Shape letters: H hidden (576), F width of the FFN (1536).
"""

from __future__ import annotations

from pathlib import Path

import torch

from ...moe.blocks.gguf import read_dense
from ...moe.layer import LayerWeights
from ..model_plugins import SMOLLM2_GGUF_SHA256, SmolLM2
from .cache import make_once
from .fetch import Progress
from .recorded import Recorded, to_stderr
from .tensors import read_checked, save_checked


class SmolLM2Model(Recorded):
    """A ModelSource that maps what it can from the cache and makes the rest once."""

    def __init__(self, params: SmolLM2, progress: Progress = to_stderr) -> None:
        self.params, self.shape, self.folder = params, params.shape(), params.folder()
        super().__init__("smollm2", progress)

    def identity(self) -> str:
        """Return the sha256 of the GGUF file."""
        return SMOLLM2_GGUF_SHA256

    def home(self) -> Path:
        """Return where the cache keeps the GGUF and all that is made of it."""
        return self.folder

    def layer(self, index: int) -> LayerWeights:
        """Return the dense FFN of a layer: gate_up [2F, H] and down [H, F] float32, mapped from the cache."""
        self.check_index(index)
        file = self.folder / "layers" / f"{index:02d}.safetensors"
        if not file.is_file():
            gguf_file = self.params.fetch(self.progress)
            make_once(file, lambda target: _save_ffn(gguf_file, index, target))
        tensors = read_checked(file)
        return LayerWeights(tensors["gate_up"], tensors["down"])

    def convert(self) -> Path:
        """Return the transformers folder of the whole model, made from the GGUF where it is not there."""
        folder = self.folder / "language_model"
        if not folder.is_dir():
            self.run_job("convert", self.params.fetch(self.progress), folder)
        return folder


def _save_ffn(gguf_file: Path, index: int, target: Path) -> None:
    gate_FH, up_FH, down_HF = (
        read_dense(gguf_file, f"blk.{index}.ffn_{part}.weight") for part in ("gate", "up", "down")
    )
    save_checked({"gate_up": torch.cat([gate_FH, up_FH]), "down": down_HF}, target)


def build(params: SmolLM2) -> SmolLM2Model:
    """Return the model; nothing is fetched before something is asked for."""
    return SmolLM2Model(params)
