"""The trial of suite ``robustness``: one step trains a model and judges it."""

from __future__ import annotations

import importlib
import math
from typing import Literal

import torch

from ...contracts import Case, Check, Cost, Facts
from ..models import substream
from .judged import Judged


class RobustTrial:
    """Trains and judges one method on one task."""

    state: Literal["none"] = "none"
    steps = 1

    def __init__(self, case: Case) -> None:
        self.case = case
        self.judged: Judged | None = None

    def begin_turn(self) -> None:
        """Nothing to make ready."""

    def run(self, step: int) -> Judged:
        """Train and judge; random numbers come from the case's seed alone, and torch's own state is put back."""
        task = importlib.import_module(f"{__package__}.{self.case.workload['task']}")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(substream(self.case.seed, "robustness"))
            self.judged = task.judge(self.case.workload, self.case.seed)
        return self.judged

    def verify(self, step: int, output: Judged) -> Check:
        """Accept finite numbers of a model whose parts, recomputed, give its answers."""
        odd = next((m.name for m in output.metrics if m.value is None or not math.isfinite(m.value)), None)
        if odd is not None:
            return Check(False, reason=f"{odd} is no number; take fewer steps of training.")
        return output.check

    def cost(self, step: int) -> Cost:
        """Return nothing: this is no measurement of time."""
        return Cost(0.0, 0.0)

    def facts(self) -> Facts:
        """Return what was judged; nothing before the training."""
        return Facts() if self.judged is None else Facts(tuple(self.judged.metrics), (), tuple(self.judged.items))

    def close(self) -> None:
        """Nothing to free."""
