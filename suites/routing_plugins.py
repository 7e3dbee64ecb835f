"""Descriptor and parameters of suite ``routing``. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ..contracts import Descriptor, unknown

PHASES = ("route", "gate", "select", "permute")
"""What of a router is timed: all of it, its scorer, what follows the scorer, and sorting its result by expert."""


@dataclass(frozen=True)
class RouterAlone:
    """The router of one layer without its experts: how long it takes, and every figure of what it decides.

    Each of ``phases`` is timed in a group of its own: ``route`` is the whole router, from hidden states to a Routing;
    ``gate`` its scorer and ``select`` all that follows it, where the router is a Pipeline; ``permute`` sorts the
    assignments by expert. The figures come with ``route``. Some of them compare with another Routing: that of routing
    ``other`` on the same layer, and the router's own for inputs with gaussian noise of ``noise`` times their root mean
    square. Drops are those of a capacity of ``capacity_factor``, tokens served in order. Tokens come in sequences of
    ``sequence``, or as one sequence where that does not divide them.
    """

    phases: tuple[str, ...] = PHASES
    other: str = "topk"
    noise: float = 0.1
    capacity_factor: float = 1.0
    sequence: int = 64

    AXES: ClassVar[Mapping[str, Any]] = {
        "structure": ["none"],
        "routing": ["topk"],
        "quantization": ["none"],
        "sparsity": ["none"],
        "backend": ["reference"],
        "traffic": ["gaussian"],
        "tokens": [256],
        "dtype": ["float32"],
        "pass": ["forward"],
        "boundary": ["topk"],
        "threads": [1],
        "residency": ["warm"],
    }
    ENGINE: ClassVar[Mapping[str, Any]] = {"processes": 1, "seconds": 0.2, "warmup_seconds": 0.2}

    def __post_init__(self) -> None:
        if not self.phases:
            raise ValueError(f"phases is empty; name some of {', '.join(PHASES)}")
        for phase in self.phases:
            if phase not in PHASES:
                raise ValueError(unknown("phase", phase, PHASES))
        if self.noise < 0 or self.capacity_factor <= 0 or self.sequence < 1:
            raise ValueError("noise must not be negative, capacity_factor be positive, and sequence be at least 1")


DESCRIPTORS = [
    Descriptor(
        "suite", "routing", "the router alone: its time and its figures", "moebench.suites.routing:create", RouterAlone
    ),
]
