"""What a trainer needs of that which it trains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor, nn


class Task(Protocol):
    """A model with data and a loss. All that is random in it follows from its seed and the step, never from before."""

    @property
    def model(self) -> nn.Module:
        """The model, its parameters float32 on the device on which it is trained."""

    def batch(self, step: int) -> Any:
        """Return the data of one step; the same for the same step, in whatever order steps are asked for."""

    def loss(self, batch: Any) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return the scalar to minimise, and the scalars whose curves are kept."""

    def evaluate(self) -> Mapping[str, float]:
        """Return figures on held-out data."""
