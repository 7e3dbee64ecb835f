"""How a task is trained. Imports no torch, so that a plan can tell it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Settings:
    """AdamW on float32 master weights, with warm-up, linear decay and clipped gradients.

    The learning rate rises over ``warmup`` steps to ``lr`` and falls to ``lr * final`` at the last of ``steps``.
    ``dtype`` is what products are computed in; weights, gradients and the optimizer's state are float32. Evaluations
    and checkpoints come every so many steps, and after the last.
    """

    steps: int
    lr: float
    warmup: int = 0
    final: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    clip: float = 1.0
    dtype: Literal["float32", "bfloat16"] = "float32"
    evaluate_every: int = 100
    checkpoint_every: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or not 0 <= self.warmup <= self.steps:
            raise ValueError(f"steps={self.steps} must be at least 1, and warmup={self.warmup} between 0 and steps.")
        if self.lr <= 0 or self.clip <= 0:
            raise ValueError(f"lr={self.lr} and clip={self.clip} must be greater than 0.")
        if min(self.evaluate_every, self.checkpoint_every) < 1:
            raise ValueError("evaluate_every and checkpoint_every must be at least 1.")

    def lr_at(self, step: int) -> float:
        """Return the learning rate of step ``step``, counted from 0."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        decayed = (step - self.warmup) / max(1, self.steps - 1 - self.warmup)
        return self.lr * (1 - (1 - self.final) * decayed)
