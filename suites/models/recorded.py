"""Models with a whole transformers model behind them: what their FFNs read on text, recorded once, and the model.

The recordings lie in ``<home>/hidden/<key>/NN.safetensors``, one file a layer, and are made by a process of their own,
so that the one that asks never loads the model. Shape letters: T tokens, H hidden.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...contracts import MoebenchError, make_key
from ...moe.shapes import ModelShape
from ..model_plugins import RECORDED_TOKENS
from ..text import calibration_text, evaluation_text
from . import Split, substream
from .fetch import Progress, run_lines
from .tensors import read_checked

WINDOW = 512
"""Tokens that see each other while hidden states are recorded."""

JOBS = "moebench.suites.models.smollm2_jobs"


def to_stderr(line: str) -> None:
    """Show a line of progress where no result is ever read from."""
    print(line, file=sys.stderr, flush=True)


class Recorded:
    """The part of a ModelSource that text makes possible.

    A subclass has ``shape``, and says by which hash recordings are known, where they lie, and where the whole model is.
    """

    shape: ModelShape
    calibration_tokens = RECORDED_TOKENS["calibration"]

    def __init__(self, name: str, progress: Progress = to_stderr) -> None:
        self.name, self.progress = name, progress
        self._recorded: dict[int, dict[str, Tensor]] = {}

    def identity(self) -> str:
        """Return the hash of the weights."""
        raise NotImplementedError

    def home(self) -> Path:
        """Return the folder in the cache of all that is made of the model."""
        raise NotImplementedError

    def convert(self) -> Path:
        """Return the transformers folder of the whole model."""
        raise NotImplementedError

    def hidden_states(self, index: int, split: Split, tokens: int, seed: int) -> Tensor:
        """Return x_TH float32: what the FFN of a layer read at consecutive tokens of the text of ``split``, mapped."""
        self.check_index(index)
        part = self.place(split, tokens, seed)
        if index not in self._recorded:
            self._recorded[index] = read_checked(self.record() / f"{index:02d}.safetensors")
        return self._recorded[index][split][part]

    def place(self, split: Split, tokens: int, seed: int) -> slice:
        """Return which of the recorded tokens of ``split`` a seed decides for; more than there are is an error."""
        available = self.recorded_tokens()[split]
        if not 0 < tokens <= available:
            raise MoebenchError(f"{available} tokens of {split} text are recorded, not {tokens}; ask for fewer.")
        rng = torch.Generator().manual_seed(substream(seed, "hidden_states", split))
        start = int(torch.randint(available - tokens + 1, (), generator=rng))
        return slice(start, start + tokens)

    def recorded_tokens(self) -> dict[str, int]:
        """Return how many tokens of each text are recorded."""
        return {**RECORDED_TOKENS, "calibration": self.calibration_tokens}

    def record(self) -> Path:
        """Return the folder of the hidden states of all layers, recorded where they are not; one file a layer.

        The folder's name is the hash of all that decides them.
        """
        texts = [calibration_text().sha256, evaluation_text().sha256]
        key = make_key([self.identity(), texts, self.recorded_tokens(), WINDOW])
        folder = self.home() / "hidden" / key[:16]
        if not folder.is_dir():
            self.run_job("record", self.convert(), folder)
        return folder

    def language_model(self) -> tuple[Any, Any]:
        """Return the transformers model (float32, weights mapped where they are so stored) and its tokenizer."""
        from .smollm2_jobs import load

        return load(self.convert())

    def run_job(self, job: str, source: Path, target: Path) -> None:
        """Run a job of smollm2_jobs in a process of its own, with as many threads as this one has."""
        numbers = (str(torch.get_num_threads()), str(self.calibration_tokens))
        command = [sys.executable, "-m", JOBS, job, str(source), str(target), *numbers]
        code, last = run_lines(command, self.progress)
        if code:
            reason = last if code == 1 else f"its process ended with code {code} after '{last}'; free some memory."
            raise MoebenchError(f"model '{self.name}' could not be prepared: {reason}")

    def check_index(self, index: int) -> None:
        """Raise MoebenchError where the model has no FFN or no experts at ``index``."""
        layers = self.shape.moe_layers
        if index not in layers:
            raise MoebenchError(f"layer {index} does not exist; {self.name} has layers {layers[0]} to {layers[-1]}.")
