"""Descriptor and parameters of suite ``robustness``. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ..contracts import Descriptor, unknown
from .plugins import LayerSuite

METHODS: Mapping[str, tuple[str, ...]] = {
    "images": ("standard", "adversarial", "advmoe"),
    "neurons": ("dense", "topk"),
    "answers": ("dense", "dense_eda", "moe", "moe_eda"),
}
"""Ways of training by the task that they are tried on."""

ALL = "all"


@dataclass(frozen=True)
class Robustness:
    """Small models trained here, judged on clean, attacked, corrupted and unseen data: one case per task and method.

    ``images``: a CNN with expert filter banks on scikit-learn's digits (AdvMoE, arXiv 2308.10110), trained plainly,
    adversarially (TRADES), or router and banks in turns (``advmoe``); accuracy clean, under PGD within ``epsilon`` (of
    pixels in 0..1) and on corrupted images, calibration error (15 bins of equal width), and how often an attack moves
    the router. ``neurons``: a ReLU MLP, dense or with only its largest activations (arXiv 2210.06313), where a part
    ``label_noise`` of the training labels is wrong. ``answers``: extractive questions made from templates, dense or
    switch-MoE encoder, with or without augmentation (EDA), as in Robust QA with MoE (arXiv 2204.09598); exact match and
    F1 on known and on unseen templates and names. ``task`` and ``method`` name one or ``all``; ``steps`` of training,
    None = what the task needs.
    """

    task: str = ALL
    method: str = ALL
    epsilon: float = 0.15
    label_noise: float = 0.3
    steps: int | None = None

    AXES: ClassVar[Mapping[str, Any]] = LayerSuite.AXES

    def __post_init__(self) -> None:
        if self.task != ALL and self.task not in METHODS:
            raise ValueError(unknown("task", self.task, [ALL, *METHODS]))
        methods = dict.fromkeys(name for task in self.tasks for name in METHODS[task])
        if self.method != ALL and self.method not in methods:
            raise ValueError(unknown("method", self.method, [ALL, *methods]))
        if not 0 < self.epsilon < 1 or not 0 <= self.label_noise < 1:
            raise ValueError(f"epsilon={self.epsilon} and label_noise={self.label_noise} must lie between 0 and 1")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps={self.steps} must be at least 1")

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks that are asked for."""
        return tuple(METHODS) if self.task == ALL else (self.task,)


DESCRIPTORS = [
    Descriptor(
        "suite",
        "robustness",
        "small MoE models under attack, corruption, wrong labels and unseen templates",
        "moebench.suites.robustness:create",
        Robustness,
        requires=("scikit-learn",),
    ),
]
