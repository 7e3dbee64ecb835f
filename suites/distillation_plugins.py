"""Descriptor and parameters of suite ``distillation``. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ..contracts import Descriptor, unknown
from .plugins import LayerSuite

SLIMMING: Mapping[str, str] = {
    "two-stage": "channels in two steps by way of three quarters, each distilled with half of the training",
    "one-stage": "channels at once, then all of the training",
    "fewer-experts": "the busier half of the experts, whole, then all of the training",
    "text": "channels at once, then all of the training on the text alone, without the teacher",
}
"""What makes half of an MoE model's experts: of their channels, but for ``fewer-experts``."""

SPLITTING: Mapping[str, str] = {
    "dense2moe": "a shared expert alone, then, frozen, beside routed ones, with half of the training each",
    "pruned-dense": "as many channels as are active in dense2moe, without experts and in the same two phases",
    "mixture-of-blocks": "as dense2moe, then one of two blocks for each token, with a third of the training each",
}
"""What makes experts of a dense model."""

RECIPES: Mapping[str, str] = {**SLIMMING, **SPLITTING}


@dataclass(frozen=True)
class Distillation(LayerSuite):
    """A trained model compressed in stages and distilled, one case for each ``recipe``.

    Recipes ``two-stage``, ``one-stage``, ``fewer-experts`` and ``text`` halve the experts of an MoE model, after
    SlimMoE (arXiv 2506.18349); ``dense2moe``, ``pruned-dense`` and ``mixture-of-blocks`` begin with a dense one, after
    Dense2MoE (arXiv 2510.09094). All have ``steps`` steps of training altogether, on the text that the model was
    trained on, and are judged on ``windows`` held-out windows. In each stage the learning rate rises to ``lr`` over a
    twentieth of ``steps``, then falls to a tenth.
    """

    recipe: tuple[str, ...] = ("two-stage", "one-stage")
    steps: int = 200
    lr: float = 1e-3
    windows: int = 48

    AXES: ClassVar[Mapping[str, Any]] = {**LayerSuite.AXES, "model": ["tinymoe"]}

    def __post_init__(self) -> None:
        if not self.recipe or len(set(self.recipe)) < len(self.recipe):
            raise ValueError("recipe must be names, each once")
        for name in self.recipe:
            if name not in RECIPES:
                raise ValueError(unknown("recipe", name, RECIPES))
        if self.steps < 6 or self.windows < 1 or self.lr <= 0:
            raise ValueError("steps must be at least 6, windows at least 1 and lr greater than 0")


DESCRIPTORS = [
    Descriptor(
        "suite",
        "distillation",
        "a model compressed and distilled, in stages or at once",
        "moebench.suites.distillation:create",
        Distillation,
        requires=("transformers",),
    ),
]
