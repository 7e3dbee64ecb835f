"""The trial of suite ``pretraining``: a step is SEGMENT steps of training, the last one judges and keeps the model."""

from __future__ import annotations

import contextlib
import math
import shutil
from typing import Literal

import torch

from ...contracts import Case, Check, Cost, Facts, Metric, MoebenchError, Registry, Series, load_attribute
from ..models.cache import locked
from .job import Job
from .trainer import Trainer

SEGMENT = 20
"""Steps of training after which progress is told."""

UNITS = {"loss": "nat/token", "bits_per_byte": "bit/byte"}


class PretrainingTrial:
    """Trains the case's model, one process at a time for each model."""

    state: Literal["none"] = "none"

    def __init__(self, case: Case, registry: Registry) -> None:
        if case.device != "cpu" and not torch.cuda.is_available():
            raise MoebenchError(f"device={case.device} is not here; leave it out to train on the CPU.")
        params = registry.params("model", case.model)
        self._open = contextlib.ExitStack()
        job: Job = load_attribute(params.trainer)(params, case.device)
        self.job, self.work = job, job.folder / "training"
        self._open.enter_context(locked(self.work))
        self.trainer = Trainer(job.task, job.settings, self.work / "checkpoints", job.identity, case.device)
        self.resumed = self.trainer.step
        self.segments = math.ceil(job.settings.steps / SEGMENT)
        self.steps = self.segments + 1
        self.judged: tuple[list[Metric], list[Series]] = ([], [])

    def begin_turn(self) -> None:
        """Nothing to make ready."""

    def run(self, step: int) -> float:
        """Train up to the end of segment ``step``, or judge the model and keep it; return the last loss."""
        if step < self.segments:
            self.trainer.advance((step + 1) * SEGMENT)
        elif all(map(math.isfinite, self.trainer.curves["loss"])):
            self.judged = self.job.finish(self.trainer)
        return self.trainer.curves["loss"][-1]

    def verify(self, step: int, output: float) -> Check:
        """A training whose loss is no number has failed."""
        if math.isfinite(output):
            return Check(True)
        steps = self.trainer.step
        return Check(False, reason=f"the loss is no number after {steps} steps; delete {self.work}, take another seed.")

    def cost(self, step: int) -> Cost:
        """Return nothing: training has no latency to compare work with."""
        return Cost(0.0, 0.0)

    def facts(self) -> Facts:
        """Return the curves, one value a step, and what the model's job says of the result."""
        trainer = self.trainer
        metrics, series = self.judged
        curves = [Series(name, tuple(values), UNITS.get(name, "1")) for name, values in trainer.curves.items()]
        held_out = [Series("held_out_step", tuple(map(float, trainer.evaluated)), "1")]
        for name, values in trainer.evaluations.items():
            held_out.append(Series(f"held_out_{name}", tuple(values), UNITS.get(name, "1")))
        notes = {"reason": f"went on from step {self.resumed}"} if self.resumed else {}
        return Facts(tuple(metrics), (*curves, *held_out, *series), notes=notes)

    def close(self) -> None:
        """Remove the checkpoints of a training that is done, and let others train the model."""
        if self.judged[0]:
            shutil.rmtree(self.work / "checkpoints", ignore_errors=True)
        self._open.close()
