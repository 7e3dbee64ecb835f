"""What is measured of a model whose training steps may leave tokens out: bytes, recall, losses and the ratio of times.

Shape letters: B sequences, T tokens, N blocks, K kept blocks, H hidden, V vocabulary.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor

from ...contracts import Metric
from ..finetuning_plugins import LemoFinetuning
from ..memory import PeakBytes, saved_bytes
from ..models import substream
from ..workload_plugins import Lemo
from .base import Identity, Report, checked, mean, median_interval
from .text_bytes import SYMBOLS
from .token_elimination import Choose, Predictor, best_blocks, kept_blocks, segment_loss
from .training import generator
from .widest import WidestResult

GRADIENTS = 1e-10
"""Gradients of the segment loss in float64 may be off by so much, relative to their norm."""

UNTIMED = 2
"""Turns before those that count."""


class Elimination:
    """A model, its predictors, and training steps with and without elimination.

    A subclass brings ``model`` (with ``layers``, ``head`` and ``loss``), the ``width`` of its residual stream, its
    texts, and what its attention says. ``fitted``, ``recalled`` and ``judged`` count sequences; ``lr`` is that of
    fine-tuning.
    """

    model: Any
    width: int
    lr: float
    fitted, recalled, judged = 64, 8, 4

    def __init__(self, params: Lemo | LemoFinetuning, seed: int) -> None:
        self.params, self.seed = params, seed
        self.predictors: list[Predictor] = []
        self.blocks = params.tokens // params.block
        self.keep = kept_blocks(self.blocks, params.kept)

    def texts(self, held_out: bool, count: int, *stream: str | int) -> Tensor:
        """Return ids_BT [count, T + 1] of the text to judge on or to learn from; ``stream`` decides where."""
        raise NotImplementedError

    def inputs(self, ids_BT: Tensor) -> list[Tensor]:
        """Return x_BTH before each layer but the last, nothing eliminated, without gradients."""
        raise NotImplementedError

    def normed(self, layer: int, x_BTH: Tensor) -> Tensor:
        """Return what the layer's attention reads."""
        raise NotImplementedError

    def scores(self, layer: int, x_BTH: Tensor) -> Tensor:
        """Return what the layer's own attention says of its blocks, [B, N, N]."""
        raise NotImplementedError

    def measure(self) -> Report:
        """Return identities, memory, recall, the effect on the loss, and the ratio of step times."""
        held_out = self.texts(True, self.judged, "judged")
        metrics = [*self.predict(), *self.memory(held_out[:1]), *self.effect(held_out), *self.times(held_out[:1])]
        metrics.append(Metric("kept_blocks", self.keep / self.blocks, "1"))
        return Report(checked(self.identities(held_out[:1])), tuple(metrics))

    def new_predictor(self, target_BNN: Tensor) -> Predictor:
        """Return an untrained predictor of standardised scores like ``target_BNN``."""
        return Predictor(self.width, self.params.block, self.params.rank)

    # --- which blocks -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def oracle(self, layer: int, x_BTH: Tensor) -> Tensor:
        """Choose by the layer's own attention to the first sequence."""
        return best_blocks(self.scores(layer, x_BTH[:1])[0], self.keep)

    @torch.no_grad()
    def predicted(self, layer: int, x_BTH: Tensor) -> Tensor:
        """Choose by the layer's predictor."""
        return best_blocks(self.predictors[layer](self.normed(layer, x_BTH[:1]))[0], self.keep)

    def at_random(self) -> Choose:
        """Return what chooses as many blocks, drawn anew for each layer and sequence."""
        rng = generator(self.seed, "lemo", "random blocks")
        return lambda layer, x_BTH: torch.randperm(self.blocks, generator=rng)[: self.keep].sort().values

    def predict(self) -> list[Metric]:
        """Train a predictor for each layer but the last, and return the recall of its blocks on held-out text."""
        calibration = self.inputs(self.texts(False, self.fitted, "predictor"))
        judged = self.inputs(self.texts(True, self.recalled, "recall"))
        self.predictors = [self._fit(layer, x_BTH) for layer, x_BTH in enumerate(calibration)]
        recalls = []
        for layer, x_BTH in enumerate(judged):
            for x_TH in x_BTH:
                wanted, found = self.oracle(layer, x_TH[None]), self.predicted(layer, x_TH[None])
                recalls.append(len(set(wanted.tolist()) & set(found.tolist())) / self.keep)
        return [
            Metric("predictor_recall", mean(recalls), "1", n=len(recalls)),
            Metric("chance_recall", self.keep / self.blocks, "1"),
        ]

    def _fit(self, layer: int, x_BTH: Tensor) -> Predictor:
        torch.manual_seed(substream(self.seed, "lemo", "predictor", layer))
        with torch.no_grad():
            target_BNN, normed_BTH = self.scores(layer, x_BTH), self.normed(layer, x_BTH)
        target_BNN = (target_BNN - target_BNN.mean()) / target_BNN.std().clamp_min(1e-9)
        predictor = self.new_predictor(target_BNN)
        optimizer = torch.optim.Adam(predictor.parameters(), lr=1e-3)
        for step in range(self.params.predictor_steps):
            chosen = torch.randperm(len(x_BTH), generator=generator(self.seed, "lemo", "fit", layer, step))[:16]
            loss = nnf.mse_loss(predictor(normed_BTH[chosen]), target_BNN[chosen])
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
        return predictor

    # --- memory -------------------------------------------------------------------------------------------------------

    def memory(self, ids_BT: Tensor) -> list[Metric]:
        """Return what a step saves for backward, the most that lives at once, and its widest tensor of logits.

        All in bytes and exact; ``peak_kept`` is with segments and ``peak_dense`` without, gradients included in both.
        """
        owned = [*self.model.parameters(), ids_BT]
        found = {}
        for name, choose in (("dense", None), ("kept", self.predicted)):
            for loss, segments in (("whole", 0), ("segments", self.params.segments)):
                found[f"saved_{name}_{loss}"] = saved_bytes(
                    lambda c=choose, s=segments: self.model.loss(ids_BT, self.params.block, c, s),  # type: ignore[misc]
                    owned,
                )
        for name, choose, segments in (("dense", None, 0), ("kept", self.predicted, self.params.segments)):
            with PeakBytes(owned) as peak:
                torch.autograd.backward(self.model.loss(ids_BT, self.params.block, choose, segments))
            self.model.zero_grad()
            found[f"peak_{name}"] = peak.peak
        for name, segments in (("whole", 0), ("segments", self.params.segments)):
            found[f"logits_{name}"] = self._logits_bytes(ids_BT, segments)
        layers = len(self.model.layers)
        share = ((layers - 1) * self.keep / self.blocks + 1) / layers
        sizes = [Metric(name, float(value), "B") for name, value in found.items()]
        return [*sizes, Metric("kept_tokens_of_layers", share, "1")]

    def _logits_bytes(self, ids_BT: Tensor, segments: int) -> int:
        x_TH, head_VH = torch.zeros(self.params.tokens, self.width), self.model.head.weight.detach()
        with WidestResult(len(head_VH)) as widest:
            segment_loss(x_TH, head_VH, ids_BT[0, 1:], segments)
        found: int = widest.bytes
        return found

    # --- quality ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def untouched(self, choose: Choose | None, held_out: Tensor) -> float:
        """Return the held-out loss of the model as it is, with the tokens that ``choose`` names."""
        return mean(float(self.model.loss(one[None], self.params.block, choose)) for one in held_out)

    def forward_losses(self, held_out: Tensor) -> dict[str, float]:
        """Return ``loss_start``, of the untouched model, and ``loss_forward_*``, with tokens eliminated."""
        with torch.no_grad():
            start = float(self.model.loss(held_out, self.params.block))
        return {"loss_start": start, "loss_forward_kept": self.untouched(self.predicted, held_out)}

    def effect(self, held_out: Tensor) -> list[Metric]:
        """Return the losses of ``forward_losses``, and that after fine-tuning with all, the kept and random tokens.

        After fine-tuning all are judged with all tokens.
        """
        found = self.forward_losses(held_out)
        original = self.model
        ways: Mapping[str, Choose | None] = {"dense": None, "kept": self.predicted, "random": self.at_random()}
        for name, choose in ways.items():
            self.model = copy.deepcopy(original)  # predicted() reads the norms of the model in training
            found[f"loss_{name}"] = self._finetuned(choose, held_out)
        self.model = original
        return [Metric(name, value, "nat/token") for name, value in found.items()]

    def _finetuned(self, choose: Choose | None, held_out: Tensor) -> float:
        optimizer = torch.optim.Adam(self.model.parameters(), lr=self.lr)
        for step in range(self.params.finetune_steps):
            ids_BT = self.texts(False, 1, "finetune", step)
            loss = self.model.loss(ids_BT, self.params.block, choose, self.params.segments)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
        with torch.no_grad():
            return float(self.model.loss(held_out, self.params.block))

    # --- time ---------------------------------------------------------------------------------------------------------

    def ways(self) -> dict[str, Choose]:
        """Return the steps that are timed against the dense one, by their metric: choosing is inside them."""
        return {"step_time_ratio": self.predicted}

    def times(self, ids_BT: Tensor) -> list[Metric]:
        """Return the times of steps with elimination over that of a dense one, taken in turns."""

        def seconds(choose: Choose | None) -> float:
            segments = 0 if choose is None else self.params.segments
            started = time.perf_counter()
            torch.autograd.backward(self.model.loss(ids_BT, self.params.block, choose, segments))
            elapsed = time.perf_counter() - started
            self.model.zero_grad()
            return elapsed

        steps: dict[str, Choose | None] = {**self.ways(), "dense": None}
        names, taken = list(steps), []
        for turn in range(UNTIMED + self.params.pairs):
            first = turn % len(names)  # none always comes first
            taken.append({name: seconds(steps[name]) for name in names[first:] + names[:first]})
        found = []
        for name in self.ways():
            centre, lo, hi = median_interval(turn[name] / turn["dense"] for turn in taken[UNTIMED:])
            found.append(Metric(name, centre, "1", lo, hi, self.params.pairs))
        return found

    # --- identities ---------------------------------------------------------------------------------------------------

    def identities(self, ids_BT: Tensor) -> list[Identity]:
        """Return what must hold of every such model."""
        segments, tokens, symbols = self.params.segments, self.params.tokens, len(self.model.head.weight)
        dense, everything = (
            self.untouched(choose, ids_BT) for choose in (None, lambda layer, x: torch.arange(self.blocks))
        )
        whole = tokens * symbols * torch.finfo(torch.float32).bits // 8
        return [
            Identity("loss with every block kept", abs(everything - dense)),
            Identity("logits of one segment", abs(self._logits_bytes(ids_BT, segments) * segments - whole)),
            Identity("gradients of the segment loss", gradient_gap(tokens, segments, self.seed), GRADIENTS),
        ]


def gradient_gap(tokens: int, segments: int, seed: int, symbols: int = SYMBOLS, hidden: int = 16) -> float:
    """Return the relative distance of the segment loss and its gradients from the plain loss's, in float64."""
    rng = generator(seed, "lemo", "gradients")
    target_T = torch.randint(symbols, (tokens,), generator=rng)
    x_TH = torch.randn(tokens, hidden, dtype=torch.float64, generator=rng).requires_grad_()
    head_VH = torch.randn(symbols, hidden, dtype=torch.float64, generator=rng).requires_grad_()
    found = []
    for parts in (segments, 0):
        loss = segment_loss(x_TH, head_VH, target_T, parts)
        found.append([loss.detach(), *torch.autograd.grad(3 * loss, [x_TH, head_VH])])
    gaps = [float((own - plain).norm() / plain.norm()) for own, plain in zip(*found, strict=True)]
    return max(gaps) if all(map(math.isfinite, gaps)) else math.nan
