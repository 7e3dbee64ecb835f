"""What a scheme keeps always on beside its routed experts. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class SharedRule:
    """What is always on: ``width`` in multiples of a routed expert's width, and what its output is multiplied by.

    ``sigmoid`` is sigmoid(w x) per token; ``softmax2`` multiplies the routed sum and the shared output by the two
    halves of a softmax over two logits. A layer that has a shared expert keeps its own; any other gets a seeded one.
    """

    width: float
    gate: Literal["none", "sigmoid", "softmax2"] = "none"

    def channels(self, width: int) -> int:
        """Return the channels of the shared expert beside routed ones of ``width`` channels."""
        channels = self.width * width
        if channels < 1 or channels != int(channels):
            raise ValueError(f"a shared expert of {self.width} times {width} channels cannot be; use another width")
        return int(channels)
