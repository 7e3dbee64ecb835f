"""SmolLM2-135M-Instruct from a GGUF file (Q4_1) on PyPI: one layer at a time, recorded hidden states, whole model.

Everything lies in ``<cache>/models/smollm2/<start of the GGUF's sha256>``: the GGUF file, ``layers/NN.safetensors``
(the FFN, dequantized), ``hidden/<key>/NN.safetensors`` (its inputs on real text) and ``language_model`` (a
transformers folder). All weights are float32, as the GGUF dequantizes.

Shape letters: T tokens, H hidden (576), F width of the FFN (1536).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...contracts import MoebenchError, make_key
from ...moe.layer import LayerWeights
from ...moe.shapes import ModelShape
from ..model_plugins import RECORDED_TOKENS, SMOLLM2_GGUF_SHA256, SmolLM2
from ..text import calibration_text, evaluation_text
from . import Split, substream
from .cache import make_once
from .fetch import Progress, run_lines
from .gguf_llama import read_tensors
from .tensors import read_checked, save_checked

WINDOW = 512
"""Tokens that see each other while hidden states are recorded."""


def to_stderr(line: str) -> None:
    """Show a line of progress where no result is ever read from."""
    print(line, file=sys.stderr, flush=True)


class SmolLM2Model:
    """A ModelSource that maps what it can from the cache and makes the rest once."""

    def __init__(self, params: SmolLM2, progress: Progress = to_stderr) -> None:
        self.params = params
        self.shape: ModelShape = params.shape()
        self.progress = progress
        self.folder = params.folder()
        self._recorded: dict[int, dict[str, Tensor]] = {}

    def layer(self, index: int) -> LayerWeights:
        """Return the dense FFN of a layer: gate_up [2F, H] and down [H, F] float32, mapped from the cache."""
        self._check_index(index)
        file = self.folder / "layers" / f"{index:02d}.safetensors"
        if not file.is_file():
            gguf_file = self.params.fetch(self.progress)
            make_once(file, lambda target: _save_ffn(gguf_file, index, target))
        tensors = read_checked(file)
        return LayerWeights(tensors["gate_up"], tensors["down"])

    def hidden_states(self, index: int, split: Split, tokens: int, seed: int) -> Tensor:
        """Return x_TH float32: what the FFN of a layer read at consecutive tokens of the text of ``split``, mapped.

        Recorded once, by a process of its own, so that this one never loads the model.
        """
        self._check_index(index)
        available = RECORDED_TOKENS[split]
        if not 0 < tokens <= available:
            raise MoebenchError(f"{available} tokens of {split} text are recorded, not {tokens}; ask for fewer.")
        if index not in self._recorded:
            self._recorded[index] = read_checked(self.record() / f"{index:02d}.safetensors")
        rng = torch.Generator().manual_seed(substream(seed, "hidden_states", split))
        start = int(torch.randint(available - tokens + 1, (), generator=rng))
        return self._recorded[index][split][start : start + tokens]

    def record(self) -> Path:
        """Return the folder of the hidden states of all layers, recorded where they are not; one file a layer.

        The folder's name is the hash of all that decides them.
        """
        texts = [calibration_text().sha256, evaluation_text().sha256]
        key = make_key([SMOLLM2_GGUF_SHA256, texts, RECORDED_TOKENS, WINDOW])
        folder = self.folder / "hidden" / key[:16]
        if not folder.is_dir():
            self._run_job("record", self.convert(), folder)
        return folder

    def convert(self) -> Path:
        """Return the transformers folder of the whole model, made from the GGUF where it is not there."""
        folder = self.folder / "language_model"
        if not folder.is_dir():
            self._run_job("convert", self.params.fetch(self.progress), folder)
        return folder

    def language_model(self) -> tuple[Any, Any]:
        """Return the transformers model (float32, weights mapped from the cache) and its tokenizer."""
        from .smollm2_jobs import load

        return load(self.convert())

    def _run_job(self, job: str, source: Path, target: Path) -> None:
        """Run a job of smollm2_jobs in a process of its own, with as many threads as this one has."""
        command = [sys.executable, "-m", "moebench.suites.models.smollm2_jobs", job, str(source), str(target)]
        code, last = run_lines([*command, str(torch.get_num_threads())], self.progress)
        if code:
            reason = last if code == 1 else f"its process ended with code {code} after '{last}'; free some memory."
            raise MoebenchError(f"model 'smollm2' could not be prepared: {reason}")

    def _check_index(self, index: int) -> None:
        if index not in self.shape.moe_layers:
            raise MoebenchError(f"layer {index} does not exist; smollm2 has layers 0 to {self.shape.layers - 1}.")


def _save_ffn(gguf_file: Path, index: int, target: Path) -> None:
    names = [f"blk.{index}.ffn_{part}.weight" for part in ("gate", "up", "down")]
    tensors = read_tensors(gguf_file, names)
    gate_FH, up_FH, down_HF = (tensors[name] for name in names)
    save_checked({"gate_up": torch.cat([gate_FH, up_FH]), "down": down_HF}, target)


def build(params: SmolLM2) -> SmolLM2Model:
    """Return the model; nothing is fetched before something is asked for."""
    return SmolLM2Model(params)
