"""What is asked of a machine: a model in one form under a load, and the bytes that this needs. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from .counts import Model, scratch_bytes
from .forms import Weights
from .hardware import Hardware
from .predict import Load
from .sizes import bytes_text

STAGED = 2
"""Experts that are on their way at a time, for which there is room beside the cache."""


@dataclass(frozen=True)
class Asked:
    """A model in one form on a machine under a load."""

    model: Model
    weights: Weights
    hardware: Hardware
    load: Load

    @property
    def kv(self) -> int:
        """Bytes of keys, values and states."""
        return self.load.batch * self.model.kv_bytes(self.load.context)

    @property
    def scratch(self) -> int:
        """Bytes of activations."""
        return scratch_bytes(self.model, self.load.batch)

    @property
    def around(self) -> int:
        """Bytes of all that is not a routed expert."""
        return self.weights.fixed + self.kv + self.scratch

    @property
    def experts(self) -> int:
        """Bytes of the routed experts."""
        return self.weights.parts["experts"]

    @property
    def staged(self) -> float:
        """Bytes of the experts that are on their way."""
        return STAGED * self.weights.expert(self.model)

    def around_text(self) -> str:
        """Return the sum of what is not a routed expert."""
        return (
            f"{bytes_text(self.weights.fixed)} of other weights + {bytes_text(self.kv)} KV "
            f"+ {bytes_text(self.scratch)} scratch"
        )
