"""Staged distillation: prune - distil - prune - distil, each stage a training with the uncompressed model's logits.

After SlimMoE (arXiv 2506.18349), whose stages go by way of an intermediate size; one stage of as many steps is the
control. Shape letters: N tokens of a text, B windows, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ...contracts import make_key
from ...moe.layer import LayerWeights
from ...moe.transforms.prune import at_random, by_utilisation, prune
from ...moe.transforms.slim import best_channels, chances, magnitudes, slim
from ..models import substream
from .compressing import Change, Evidence, changed_model, distillation_loss, evidence
from .language import LanguageModelTask, Windows, windows_at
from .settings import Settings
from .trainer import Trainer


@dataclass(frozen=True)
class Stage:
    """Compress the experts, then train for ``steps`` steps.

    ``width`` is how many channels each expert keeps, ``experts`` how many experts stay; None keeps all. Channels go by
    the Taylor term of the distillation loss, by ``magnitude`` or at ``random``; experts go by the tokens that they
    get, or at ``random``. The loss is the divergence from the ``teacher``, or as a control that of the ``text`` alone:
    its next tokens, as the teacher was trained.
    """

    steps: int
    width: int | None = None
    experts: int | None = None
    by: Literal["taylor", "magnitude", "random"] = "taylor"
    loss: Literal["teacher", "text"] = "teacher"

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps={self.steps} must be at least 1.")


@dataclass(frozen=True)
class Text:
    """What is distilled on: a text's tokens, ``batch`` = (windows, tokens of one) a step, and held-out windows.

    Every second window begins with token ``end``. ``calibration`` batches of the same text are read to score.
    """

    ids_N: Tensor
    held_out: Windows
    batch: tuple[int, int]
    end: int
    calibration: int = 4


class DistillationTask(LanguageModelTask):
    """The student of a teacher: the loss is KL(teacher || student) of the next token, in nats, or that of the text."""

    def __init__(
        self, student: Any, teacher: Any, text: Text, seed: int, device: str = "cpu", by: str = "teacher"
    ) -> None:
        super().__init__(student, text.ids_N, text.held_out, text.batch, text.end, seed, device)
        self.teacher, self.by = teacher.to(device).eval(), by

    def loss(self, batch: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return the divergence of a batch, or its cross-entropy and balance."""
        if self.by == "text":
            return super().loss(batch)
        loss = distillation_loss(self.model, self.teacher, batch)
        self._routed.clear()
        return loss, {"kl": loss}

    def evaluate(self) -> Mapping[str, float]:
        """Return bits per byte and the divergence in nats per token, of the held-out windows."""
        return {**super().evaluate(), "kl": held_out_divergence(self.model, self.teacher, self.held_out, self.device)}


@torch.no_grad()
def held_out_divergence(student: Any, teacher: Any, held_out: Windows, device: str) -> float:
    """Return KL(teacher || student) in nats per token, the mean over windows of one length."""
    parts = [float(distillation_loss(student, teacher, ids_T[None])) for ids_T in held_out.ids_BT.to(device)]
    return sum(parts) / len(parts)


def distilled(
    student: Any,
    teacher: Any,
    text: Text,
    stages: Sequence[Stage],
    settings: Settings,
    folder: Path,
    identity: str,
    device: str = "cpu",
) -> tuple[Any, Trainer]:
    """Return the student after the last of ``stages``, of which it has the others behind it, and its training.

    The teacher is left alone. ``settings`` hold but for the number of steps: every stage warms up and decays by itself,
    over no more steps than it has. Data of a step follow from the seed and the stage. A stage goes on from its
    checkpoint in ``folder``; ``identity`` names the teacher and the text.
    """
    stage, number = stages[-1], len(stages) - 1
    seed = substream(settings.seed, "distillation", number)
    student = compressed(student, teacher, stage, text, seed)
    own = replace(settings, steps=stage.steps, warmup=min(settings.warmup, stage.steps), seed=seed)
    task = DistillationTask(student, teacher, text, seed, device, stage.loss)
    trainer = Trainer(task, own, folder / f"stage-{number}", make_key([identity, list(stages)]), device)
    trainer.advance(stage.steps)
    student.eval()
    return student, trainer


def compressed(student: Any, teacher: Any, stage: Stage, text: Text, seed: int) -> Any:
    """Return the student as the stage begins with it: its experts compressed, not yet distilled."""
    device = next(student.parameters()).device
    batches = (
        windows_at(text.ids_N, text.batch, text.end, substream(seed, "calibration", number)).to(device)
        for number in range(text.calibration)
    )
    return changed_model(student, change(stage, evidence(student, teacher, batches), seed))


def change(stage: Stage, found: Evidence, seed: int) -> Change:
    """Return what a stage does to one layer: experts go first, then channels of those that stay."""

    def one(layer: int, weights: LayerWeights) -> LayerWeights:
        drawn = substream(seed, "compression", layer)
        terms_EF = found.terms_EF[layer]
        if stage.experts is not None:
            kept = _kept(stage, stage.experts, found.load_E[layer], drawn)
            weights, terms_EF = prune(weights, kept), terms_EF[list(kept)]
        if stage.width is None:
            return weights
        return slim(weights, best_channels(_scores(stage, weights, terms_EF, drawn), stage.width))

    return one


def _kept(stage: Stage, keep: int, load_E: Tensor, seed: int) -> tuple[int, ...]:
    return at_random(len(load_E), keep, seed) if stage.by == "random" else by_utilisation(load_E, keep)


def _scores(stage: Stage, weights: LayerWeights, terms_EF: Tensor, seed: int) -> Tensor:
    if stage.by == "magnitude":
        return magnitudes(weights)
    return terms_EF.abs() if stage.by == "taylor" else chances(weights, seed)
