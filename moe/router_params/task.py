"""Parameters of routers that know the task. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...contracts import Descriptor
from ..shapes import ModelShape
from .ffn_only import SoftmaxTopK


@dataclass(frozen=True)
class M3ViT(SoftmaxTopK):
    """M3ViT (arXiv 2210.14793): one linear gate per task, top-k of softmax, not renormalised.

    ``slice_width`` n lets task i choose among n neighbouring experts only; the slices are spread evenly over the
    experts, from the first to the last. (The released code adds the starts up, so that with more than two tasks its
    slices run beyond the last expert.) In training N(0, 1) * ``noise_std`` / (experts that the task may use) is added
    to the logits.
    """

    beyond_text: ClassVar[str] = "task"

    k: int = 4
    tasks: int = 2
    slice_width: int | None = None
    noise_std: float = 0.0

    def __post_init__(self) -> None:
        if self.tasks < 1:
            raise ValueError(f"tasks={self.tasks} must be at least 1")
        if self.noise_std < 0:
            raise ValueError(f"noise_std={self.noise_std} must not be negative")

    def available(self, shape: ModelShape) -> int:
        """Return how many experts one task may use."""
        if self.slice_width is None:
            return shape.experts
        if not 0 < self.slice_width <= shape.experts:
            raise ValueError(f"slice_width={self.slice_width} must lie between 1 and the {shape.experts} experts")
        return self.slice_width

    def slices(self, shape: ModelShape) -> tuple[range, ...]:
        """Return the expert ids that each task may use."""
        width = self.available(shape)
        starts = [task * (shape.experts - width) // max(self.tasks - 1, 1) for task in range(self.tasks)]
        return tuple(range(start, start + width) for start in starts)


DESCRIPTORS = [
    Descriptor("routing", "m3vit", "M3ViT: one gate per task", "moebench.moe.routers.task:build", M3ViT),
]
