"""What probes are made of: stages that return checks, and facts at the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ...contracts import Check, Facts

Stage = Callable[[], Sequence[Check]]
"""One step of a probe: it computes something and returns what was checked of it."""

ROUNDING = 1e-4
"""Pieces recomposed in another order may differ by this much of the whole's norm in float32."""


class Probe(Protocol):
    """A probe of one case: its stages run once each, in order."""

    input_sha256: str

    @property
    def stages(self) -> Sequence[Stage]:
        """Return what is to be done, in order."""

    def facts(self) -> Facts:
        """Return what was found, once all stages have run."""

    def close(self) -> None:
        """Free what the probe holds."""


def same_bits(found: Tensor, expected: Tensor, what: str) -> Check:
    """Accept equal bits alone."""
    equal = torch.equal(found, expected)
    return Check(equal, 0.0 if equal else 1.0, 0.0, "" if equal else f"{what} changes the model's output")


def close(found: Tensor, expected: Tensor, what: str, bound: float = ROUNDING) -> Check:
    """Accept a distance of ``bound`` of the norm of ``expected``."""
    scale = float(expected.double().norm()) or 1.0
    error = float((found.double() - expected.double()).norm()) / scale
    ok = error <= bound  # false for NaN
    return Check(ok, error, bound, "" if ok else f"{what}: off by {error:.2g} of its norm, allowed {bound:.2g}")


def holds(condition: bool, what: str) -> Check:
    """Accept a condition; ``what`` is said where it does not hold."""
    return Check(condition, 0.0 if condition else 1.0, 0.0, "" if condition else what)
