"""What every claim is made of: seeded numbers, registered routers, and an outcome that says whether it means anything.

Shape letters: T tokens, H hidden, E expert ids, F expert width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...contracts import Registry, Selection
from ...moe.balance.rows import given
from ...moe.layer import LayerWeights
from ...moe.metrics import load_metrics
from ...moe.router import RouterBundle, seeded_normal
from ...moe.router_parts import seeded_uniform
from ...moe.routing import Routing
from ...moe.shapes import ModelShape
from ..models import substream


@dataclass(frozen=True)
class Outcome:
    """The two numbers that a rule compares, and whether they were come by soundly.

    ``sound`` is what must be true for them to mean anything (something was dropped, experts were used), and ``reason``
    says what is wrong where it is not. ``figures`` are kept beside them.
    """

    a: float
    b: float
    sound: bool
    reason: str
    figures: Mapping[str, float] = field(default_factory=dict)


class Scene:
    """Numbers and routers of one seed; everything is named, so that a claim depends on nothing drawn elsewhere."""

    def __init__(self, registry: Registry, seed: int) -> None:
        self.registry = registry
        self.seed = seed

    def normal(self, *size: int, std: float = 1.0, name: str = "x") -> Tensor:
        """Return float32 N(0, std^2)."""
        return seeded_normal(size, std, self.seed, f"claim.{name}")

    def uniform(self, *size: int, name: str) -> Tensor:
        """Return float32 U(0, 1)."""
        return seeded_uniform(size, 0.5, self.seed, f"claim.{name}") + 0.5

    def rng(self, name: str = "rng") -> torch.Generator:
        """Return a generator."""
        return torch.Generator().manual_seed(substream(self.seed, "claim", name))

    def router(
        self, routing: str, shape: ModelShape, rows_EH: Tensor | None = None, params: Mapping[str, Any] | None = None
    ) -> RouterBundle:
        """Return the registered ``routing`` with ``params`` for a layer of ``shape`` with router ``rows_EH``."""
        factory = self.registry.get("routing", routing).create(params or {})
        bundle: RouterBundle = factory(LayerWeights(torch.zeros(1), torch.zeros(1), rows_EH), shape, self.seed)
        return bundle


Claim = Callable[[Scene], Outcome]


def layer_shape(experts: int = 16, hidden: int = 32, width: int = 8, layers: int = 1, **changes: Any) -> ModelShape:
    """Return the shape of a small model, all of whose layers hold experts."""
    selection = Selection("softmax", 2, renormalize=True)
    return ModelShape(hidden, width, experts, layers, tuple(range(layers)), selection, **changes)


def gap(found: Tensor, wanted: Tensor) -> float:
    """Return the norm of the difference over the norm of ``wanted``."""
    return float((found - wanted).norm() / wanted.norm())


def largest(found: Tensor, wanted: Tensor) -> float:
    """Return the largest absolute difference."""
    return float((found - wanted).abs().max())


def logits_of(routing: Routing) -> Tensor:
    """Return logits_TE."""
    return given(routing.logits_TE, "logits_TE")


def imbalance(routing: Routing) -> float:
    """Return the largest over the mean load."""
    return next(float(m.value or 0) for m in load_metrics(routing.counts_E) if m.name == "load_max_over_mean")
