"""Workload ``lemo``: a training step with fewer tokens in each layer (LeMo / Jenga, ATC 2025), on a byte-level MoE
language model that is trained here.

Shape letters: B sequences, T tokens, N blocks, K kept blocks, H hidden, V vocabulary.
"""

from __future__ import annotations

import copy
import math
import time

import torch
import torch.nn.functional as nnf
from torch import Tensor

from ...contracts import Metric
from ..memory import PeakBytes, saved_bytes
from ..models import substream
from ..workload_plugins import Lemo
from . import byte_model, text_bytes, token_elimination, transformer
from .base import Identity, Report, checked, mean, median_interval
from .byte_model import ByteTask
from .text_bytes import SYMBOLS, symbols, text_sha256, windows
from .token_elimination import Choose, Predictor, best_blocks, kept_blocks, oracle_scores, segment_loss
from .training import generator, schedule, trained
from .transformer import Block
from .widest import WidestResult

GRADIENTS = 1e-10
"""Gradients of the segment loss in float64 may be off by so much, relative to their norm."""


class LemoWorkload:
    """The model, its predictors, and training steps with and without elimination."""

    def __init__(self, params: Lemo, seed: int) -> None:
        self.params, self.seed = params, seed
        self.task = ByteTask(params, seed)
        self.model = self.task.model
        self.predictors: list[Predictor] = []
        self.blocks = params.tokens // params.block
        self.keep = kept_blocks(self.blocks, params.kept)

    def train(self) -> float:
        """Train the model, not to its end, so that fine-tuning has something left to do."""
        settings = schedule(self.params.steps, 3e-3, self.seed)
        identity = {"name": "lemo", "params": self.params, "seed": self.seed, "text": text_sha256()}
        modules = (byte_model, text_bytes, token_elimination, transformer)
        return trained(self.task, settings, identity, modules)

    def measure(self) -> Report:
        """Return identities, memory, recall, the effect on the loss, and the ratio of step times."""
        held_out = self._held_out(4)
        metrics = [*self._predict(), *self._memory(held_out[:1]), *self._effect(held_out), self._time(held_out[:1])]
        metrics.append(Metric("kept_blocks", self.keep / self.blocks, "1"))
        return Report(checked(self._identities(held_out[:1])), tuple(metrics))

    def _held_out(self, count: int, name: str = "judged") -> Tensor:
        return windows(symbols(True), count, self.params.tokens + 1, generator(self.seed, "lemo", name))

    # --- which blocks -------------------------------------------------------------------------------------------------

    def oracle(self, layer: int, x_BTH: Tensor) -> Tensor:
        """Choose by the layer's own attention to the first sequence."""
        return best_blocks(oracle_scores(self._layer(layer), x_BTH[:1], self.params.block)[0], self.keep)

    @torch.no_grad()
    def predicted(self, layer: int, x_BTH: Tensor) -> Tensor:
        """Choose by the layer's predictor."""
        normed_BTH = self._layer(layer).attention_norm(x_BTH[:1])
        return best_blocks(self.predictors[layer](normed_BTH)[0], self.keep)

    def _layer(self, layer: int) -> Block:
        found = self.model.layers[layer]
        if not isinstance(found, Block):
            raise TypeError(f"layer {layer} is no Block")
        return found

    @torch.no_grad()
    def _inputs(self, ids_BT: Tensor) -> list[Tensor]:
        """Return x_BTH before each layer but the last, nothing eliminated."""
        inputs: list[Tensor] = []
        x_BTH = self.model.embedded(ids_BT[:, :-1])
        for layer in self.model.layers[:-1]:
            inputs.append(x_BTH)
            x_BTH = layer(x_BTH, transformer.causal)
        return inputs

    def _predict(self) -> list[Metric]:
        """Train a predictor for each layer but the last, and return the recall of its blocks on held-out text."""
        texts = windows(symbols(False), 64, self.params.tokens + 1, generator(self.seed, "lemo", "predictor"))
        calibration, judged = self._inputs(texts), self._inputs(self._held_out(8, "recall"))
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
        predictor = Predictor(self.params.hidden, self.params.block, self.params.rank)
        target_BNN = oracle_scores(self._layer(layer), x_BTH, self.params.block)
        target_BNN = (target_BNN - target_BNN.mean()) / target_BNN.std().clamp_min(1e-9)
        normed_BTH = self._layer(layer).attention_norm(x_BTH).detach()
        optimizer = torch.optim.Adam(predictor.parameters(), lr=1e-3)
        for step in range(self.params.predictor_steps):
            chosen = torch.randperm(len(x_BTH), generator=generator(self.seed, "lemo", "fit", layer, step))[:16]
            loss = nnf.mse_loss(predictor(normed_BTH[chosen]), target_BNN[chosen])
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
        return predictor

    # --- memory -------------------------------------------------------------------------------------------------------

    def _memory(self, ids_BT: Tensor) -> list[Metric]:
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
        layers = self.params.depth
        share = ((layers - 1) * self.keep / self.blocks + 1) / layers
        sizes = [Metric(name, float(value), "B") for name, value in found.items()]
        widest = [
            Metric(f"logits_{name}", float(self._logits_bytes(ids_BT, segments)), "B")
            for name, segments in (("whole", 0), ("segments", self.params.segments))
        ]
        return [*sizes, *widest, Metric("kept_tokens_of_layers", share, "1")]

    def _logits_bytes(self, ids_BT: Tensor, segments: int) -> int:
        x_TH = torch.zeros(self.params.tokens, self.params.hidden)
        with WidestResult(SYMBOLS) as widest:
            segment_loss(x_TH, self.model.head.weight.detach(), ids_BT[0, 1:], segments)
        found: int = widest.bytes
        return found

    # --- quality ------------------------------------------------------------------------------------------------------

    def _effect(self, held_out: Tensor) -> list[Metric]:
        """Return the held-out loss after fine-tuning with all tokens, with the kept ones, and with random ones.

        All are judged with all tokens; ``loss_start`` is that before, ``loss_forward_kept`` that of the untouched model
        with tokens eliminated.
        """
        block = self.params.block
        with torch.no_grad():
            start = float(self.model.loss(held_out, block))
            eliminated = mean(float(self.model.loss(one[None], block, self.predicted)) for one in held_out)
        found = {"loss_start": start, "loss_forward_kept": eliminated}
        original = self.model
        rng = generator(self.seed, "lemo", "random blocks")
        ways: dict[str, Choose | None] = {
            "dense": None,
            "kept": self.predicted,
            "random": lambda layer, x: torch.randperm(self.blocks, generator=rng)[: self.keep].sort().values,
        }
        for name, choose in ways.items():
            self.model = copy.deepcopy(original)  # predicted() reads the norms of the model in training
            found[f"loss_{name}"] = self._finetuned(choose, held_out)
        self.model = original
        return [Metric(name, value, "nat/token") for name, value in found.items()]

    def _finetuned(self, choose: Choose | None, held_out: Tensor) -> float:
        optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3)
        for step in range(self.params.finetune_steps):
            rng = generator(self.seed, "lemo", "finetune", step)
            ids_BT = windows(symbols(False), 1, self.params.tokens + 1, rng)
            loss = self.model.loss(ids_BT, self.params.block, choose, self.params.segments)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
        with torch.no_grad():
            return float(self.model.loss(held_out, self.params.block))

    # --- time ---------------------------------------------------------------------------------------------------------

    def _time(self, ids_BT: Tensor) -> Metric:
        """Return the time of a step with elimination (choosing included) over that of a dense one, taken in turns."""

        def seconds(choose: Choose | None, segments: int) -> float:
            started = time.perf_counter()
            torch.autograd.backward(self.model.loss(ids_BT, self.params.block, choose, segments))
            elapsed = time.perf_counter() - started
            self.model.zero_grad()
            return elapsed

        ratios = []
        for turn in range(self.params.pairs + 2):
            ways = [(self.predicted, self.params.segments), (None, 0)]
            order = (0, 1) if turn % 2 else (1, 0)  # neither always comes first
            taken = dict(zip(order, (seconds(*ways[way]) for way in order), strict=True))
            ratios.append(taken[0] / taken[1])
        centre, lo, hi = median_interval(ratios[2:])
        return Metric("step_time_ratio", centre, "1", lo, hi, self.params.pairs)

    # --- identities ---------------------------------------------------------------------------------------------------

    def _identities(self, ids_BT: Tensor) -> list[Identity]:
        segments, tokens = self.params.segments, self.params.tokens
        with torch.no_grad():
            dense, everything = (
                float(self.model.loss(ids_BT, self.params.block, choose))
                for choose in (None, lambda layer, x: torch.arange(self.blocks))
            )
        whole = tokens * SYMBOLS * torch.finfo(torch.float32).bits // 8
        return [
            Identity("loss with every block kept", abs(everything - dense)),
            Identity("logits of one segment", abs(self._logits_bytes(ids_BT, segments) * segments - whole)),
            Identity("gradients of the segment loss", gradient_gap(tokens, segments, self.seed), GRADIENTS),
        ]


def gradient_gap(tokens: int, segments: int, seed: int, hidden: int = 16) -> float:
    """Return the relative distance of the segment loss and its gradients from the plain loss's, in float64."""
    rng = generator(seed, "lemo", "gradients")
    target_T = torch.randint(SYMBOLS, (tokens,), generator=rng)
    x_TH = torch.randn(tokens, hidden, dtype=torch.float64, generator=rng).requires_grad_()
    head_VH = torch.randn(SYMBOLS, hidden, dtype=torch.float64, generator=rng).requires_grad_()
    found = []
    for parts in (segments, 0):
        loss = segment_loss(x_TH, head_VH, target_T, parts)
        found.append([loss.detach(), *torch.autograd.grad(3 * loss, [x_TH, head_VH])])
    gaps = [float((own - plain).norm() / plain.norm()) for own, plain in zip(*found, strict=True)]
    return max(gaps) if all(map(math.isfinite, gaps)) else math.nan
