"""The recipes of suite ``distillation``: what each stage does to the student, and how it is trained.

A recipe is asked for its stages one after another, so that progress can be told.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from ...contracts import make_key
from ..distillation_plugins import SLIMMING
from ..models import substream
from .dense2moe import SHARED, BlockTask, K, Phase, active_parameters, enter, split_model
from .distill import Stage, Text, compressed, distilled
from .settings import Settings
from .trainer import Trainer


@dataclass(frozen=True)
class Setup:
    """What all stages share: the teacher, the text, settings of a stage but for its steps, and a place to work in."""

    teacher: Any
    text: Text
    settings: Settings
    folder: Path
    identity: str


class Recipe(Protocol):
    """A student on its way."""

    stages: int
    student: Any
    """The student after the stages that were run."""

    def begun(self) -> Any:
        """Return the student as the last stage's size has it, before any training."""

    def run(self, number: int) -> Trainer:
        """Run stage ``number`` and return its training."""

    def active(self) -> float:
        """Return the weights of experts that a token meets, routers left out."""


class Slimming:
    """An MoE model's experts halved, by the stages of ``distill``."""

    def __init__(self, name: str, setup: Setup, steps: int) -> None:
        config = setup.teacher.config
        width = config.moe_intermediate_size
        half, first = width // 2, steps // 2
        self.plan: list[Stage] = {
            "two-stage": [Stage(first, width=(width + half) // 2), Stage(steps - first, width=half)],
            "one-stage": [Stage(steps, width=half)],
            "fewer-experts": [Stage(steps, experts=config.num_experts // 2)],
            "text": [Stage(steps, width=half, loss="text")],
        }[name]
        self.setup, self.stages, self.student = setup, len(self.plan), setup.teacher

    def begun(self) -> Any:
        """Return the teacher, cut to the last size at once."""
        seed = substream(self.setup.settings.seed, "distillation", 0)
        whole = replace(self.plan[-1], loss="teacher")
        return compressed(self.setup.teacher, self.setup.teacher, whole, self.setup.text, seed)

    def run(self, number: int) -> Trainer:
        """Compress, then train."""
        own, stages = self.setup, self.plan[: number + 1]
        self.student, trainer = distilled(
            self.student, own.teacher, own.text, stages, own.settings, own.folder, own.identity
        )
        return trainer

    def active(self) -> float:
        """Return k experts of every layer."""
        config = self.student.config
        one = 3.0 * config.hidden_size * config.moe_intermediate_size
        return float(config.num_hidden_layers * config.num_experts_per_tok * one)


class Splitting:
    """Experts of a dense model's channels, by the phases of ``dense2moe``; features count from the second stage on."""

    def __init__(self, name: str, setup: Setup, steps: int) -> None:
        phases: dict[str, tuple[Phase, ...]] = {
            "dense2moe": ("shared", "experts"),
            "pruned-dense": ("shared", "shared"),
            "mixture-of-blocks": ("shared", "experts", "blocks"),
        }
        self.phases = phases[name]
        self.always = SHARED + K if name == "pruned-dense" else SHARED
        self.setup, self.stages = setup, len(self.phases)
        self.steps = [steps * (i + 1) // self.stages - steps * i // self.stages for i in range(self.stages)]
        self.student = self._split()

    def _split(self) -> Any:
        return split_model(self.setup.teacher, self.setup.text, self.always, self.setup.settings.seed)

    def begun(self) -> Any:
        """Return the student with all that the last phase has, untrained."""
        student = self._split()
        enter(student, self.phases[-1])
        return student

    def run(self, number: int) -> Trainer:
        """Enter the phase, then train."""
        own, steps = self.setup, self.steps[number]
        seed = substream(own.settings.seed, "distillation", number)
        enter(self.student, self.phases[number])
        task = BlockTask(self.student, own.teacher, own.text, seed, features=number > 0)
        settings = replace(own.settings, steps=steps, warmup=min(own.settings.warmup, steps), seed=seed)
        known = make_key([own.identity, self.phases[: number + 1], self.steps])
        trainer = Trainer(task, settings, own.folder / f"stage-{number}", known)
        trainer.advance(steps)
        self.student.eval()
        return trainer

    def active(self) -> float:
        """Return what is always on, and k experts, of every layer."""
        return active_parameters(self.student)


def recipe(name: str, setup: Setup, steps: int) -> Recipe:
    """Return the recipe of that name, before its first stage."""
    return Slimming(name, setup, steps) if name in SLIMMING else Splitting(name, setup, steps)
