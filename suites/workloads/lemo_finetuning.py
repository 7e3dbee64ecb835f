"""Workload ``lemo_finetuning``: a fine-tuning step with fewer tokens in each layer (LeMo / Jenga, ATC 2025), on a
pretrained model.

Shape letters: B sequences, T tokens, N blocks, H hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...contracts import Metric
from ..finetuning_plugins import LemoFinetuning
from ..memory import saved_bytes
from ..models import substream
from ..quality.passage import take_passage
from ..text import calibration_text, evaluation_text
from .base import Identity
from .elimination import Elimination
from .pretrained import PretrainedModel
from .token_elimination import Choose, Predictor, segment_loss

LOSS = 1e-5
"""Our forward pass and transformers' own may differ by this much of the loss in float32."""


class PlacedPredictor(Predictor):
    """A predictor that begins with what is expected of each pair of places: rotary positions leave no trace in what it
    reads."""

    def __init__(self, hidden: int, block: int, rank: int, expected_NN: Tensor) -> None:
        super().__init__(hidden, block, rank)
        self.expected_NN = expected_NN
        last: Any = self.query[-1]
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, x_BTH: Tensor) -> Tensor:
        """Return scores [B, N, N]."""
        scores_BNN: Tensor = self.expected_NN + super().forward(x_BTH)
        return scores_BNN


class LemoFinetuningWorkload(Elimination):
    """Elimination in a language model that was trained elsewhere."""

    def __init__(self, params: LemoFinetuning, seed: int, model: Any, tokenizer: Any) -> None:
        super().__init__(params, seed)
        self.model, self.tokenizer = PretrainedModel(model), tokenizer
        self.width, self.lr = model.config.hidden_size, params.lr
        self.fitted, self.recalled, self.judged = params.fitted, params.judged, params.judged

    def train(self) -> float:
        """Train nothing: the model is pretrained. Return its loss on a sequence of the text to learn from."""
        with torch.no_grad():
            return float(self.model.loss(self.texts(False, 1, "first"), self.params.block))

    def texts(self, held_out: bool, count: int, *stream: str | int) -> Tensor:
        """Return consecutive sequences from a place that the stream decides."""
        text, tokens = evaluation_text() if held_out else calibration_text(), self.params.tokens
        passage = take_passage(self.tokenizer, text, count * tokens, substream(self.seed, "lemo", *stream))
        return passage.ids.unfold(0, tokens + 1, tokens)

    def inputs(self, ids_BT: Tensor) -> list[Tensor]:
        """Return x_BTH before each layer but the last, nothing eliminated."""
        return self.model.inputs(ids_BT)  # type: ignore[no-any-return]

    def normed(self, layer: int, x_BTH: Tensor) -> Tensor:
        """Return what the layer's attention reads."""
        return self.model.normed(layer, x_BTH)  # type: ignore[no-any-return]

    def scores(self, layer: int, x_BTH: Tensor) -> Tensor:
        """Return what the layer's own attention says of its blocks."""
        return self.model.scores(layer, x_BTH, self.params.block)  # type: ignore[no-any-return]

    def new_predictor(self, target_BNN: Tensor) -> Predictor:
        """Return one that begins with the mean of the scores to learn."""
        return PlacedPredictor(self.width, self.params.block, self.params.rank, target_BNN.mean(0))

    def memory(self, ids_BT: Tensor) -> list[Metric]:
        """Return also ``saved_loss``: what the loss in segments keeps by itself, the head's gradient above all."""
        x_TH = torch.zeros(self.params.tokens, self.width, requires_grad=True)
        head_VH, target_T = self.model.head.weight, ids_BT[0, 1:]
        alone = saved_bytes(lambda: segment_loss(x_TH, head_VH, target_T, self.params.segments), [head_VH, target_T])
        return [*super().memory(ids_BT), Metric("saved_loss", float(alone), "B")]

    def forward_losses(self, held_out: Tensor) -> dict[str, float]:
        """Return also the losses with random blocks, and with those of the layers' own attention."""
        others = {"random": self.at_random(), "oracle": self.oracle}
        found = {f"loss_forward_{name}": self.untouched(choose, held_out) for name, choose in others.items()}
        return {**super().forward_losses(held_out), **found}

    def ways(self) -> dict[str, Choose]:
        """Return also the step whose layers ask their own attention."""
        return {**super().ways(), "step_time_ratio_oracle": self.oracle}

    def identities(self, ids_BT: Tensor) -> list[Identity]:
        """Return also that the model without elimination is transformers' own."""
        with torch.no_grad():
            own, theirs = float(self.model.loss(ids_BT, self.params.block)), float(self.model.own_loss(ids_BT))
        return [*super().identities(ids_BT), Identity("loss of transformers' own forward", abs(own / theirs - 1), LOSS)]
