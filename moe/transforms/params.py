"""Descriptors and parameters of transforms as structures. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from ...contracts import Descriptor, Selection
from ..plugins import Split
from ..shapes import ModelShape


def _check_experts(shape: ModelShape, name: str) -> None:
    if shape.experts == 0:
        raise ValueError(f"the model's FFNs are dense; '{name}' wants experts")


@dataclass(frozen=True)
class Prune:
    """Keep ``keep`` experts, None half of them, and let the gate choose among these (Z-code M3, arXiv 2109.10465).

    Kept are those that most calibration tokens have among their ``top`` best, or some at ``random``, which is what
    utilisation is to be held against. A token has no more experts than are kept; a selection by groups, which would
    lose different numbers of experts, becomes one over all that are kept. At ``random`` the same ids go in every layer.
    """

    keep: int | None = None
    by: Literal["utilisation", "random"] = "utilisation"
    top: int = 1

    def kept(self, experts: int) -> int:
        """Return how many of ``experts`` stay."""
        return max(1, experts // 2) if self.keep is None else self.keep

    def reshape(self, shape: ModelShape) -> ModelShape:
        """Return the shape with the kept experts alone."""
        _check_experts(shape, "prune")
        for name, number in (("keep", self.kept(shape.experts)), ("top", self.top)):
            if not 0 < number <= shape.experts:
                raise ValueError(f"{name}={number} must lie between 1 and the layer's {shape.experts} experts")
        kept, own = self.kept(shape.experts), shape.selection
        return shape.with_(experts=kept, selection=replace(own, k=min(own.k, kept), groups=None))


@dataclass(frozen=True)
class Aggregate:
    """The experts and gate rows of a layer and of its own copy in one layer: AoE of a model with itself (Z-code M3).

    Two checkpoints aggregated so go on training; the copy shows what that costs and leaves exactly known mathematics:
    the gate's best expert has half its probability, and twice as many experts per token are the model itself. Groups of
    experts, and those kept, double too.
    """

    def reshape(self, shape: ModelShape) -> ModelShape:
        """Return the shape with twice the experts."""
        _check_experts(shape, "aggregate")
        own = shape.selection
        groups = None if own.groups is None else (2 * own.groups[0], 2 * own.groups[1])
        return shape.with_(experts=2 * shape.experts, selection=replace(own, groups=groups))


@dataclass(frozen=True)
class Upcycle:
    """``experts`` copies of a dense FFN behind a random router, top-k of softmax renormalised (sparse upcycling).

    Without ``noise`` (the standard deviation of what is added to each copy) the layer is the FFN, whatever the router.
    Router and noise come from the seed and are the same in every layer.
    """

    experts: int = 8
    k: int = 2
    noise: float = 0.0

    def __post_init__(self) -> None:
        if self.noise < 0:
            raise ValueError(f"noise={self.noise} must not be negative")

    def reshape(self, shape: ModelShape) -> ModelShape:
        """Return the shape of the experts, each as wide as the FFN."""
        if shape.experts:
            raise ValueError(f"the model has {shape.experts} experts already; 'upcycle' wants a dense FFN")
        if not 0 < self.k <= self.experts:
            raise ValueError(f"k={self.k} must lie between 1 and the {self.experts} experts")
        return shape.with_(experts=self.experts, selection=Selection("softmax", self.k, renormalize=True))


@dataclass(frozen=True)
class TaylorSplit(Split):
    """A dense FFN cut as by ``split``, its most important channels always on (after Dense2MoE, arXiv 2510.09094).

    Importance is the first-order Taylor term |a dL/da| of a channel's activation a, mean over calibration tokens. A
    structure sees one layer's weights and inputs, so L is not the model's loss but the layer's: half the squared error
    of the output as a part of the output, at the layer left out. The first ``shared`` / ``experts`` of the channels
    become the shared expert, the others routed experts. The controls: channels are important by ``magnitude``, the norm
    of all their weights, or by chance (``random``).
    """

    shared: int = 2
    by: Literal["taylor", "magnitude", "random"] = "taylor"
    assignment: Literal["contiguous", "coactivation"] = "coactivation"

    def __post_init__(self) -> None:
        if self.shared < 1:
            raise ValueError(f"shared={self.shared} must be at least 1; structure 'split' does without")


_STEPS = "moebench.moe.transforms.steps:"

DESCRIPTORS = [
    Descriptor("structure", "prune", "some of the experts, the gate restricted to them", _STEPS + "pruned", Prune),
    Descriptor("structure", "aggregate", "the experts of a layer and of its copy", _STEPS + "aggregated", Aggregate),
    Descriptor(
        "structure",
        "taylor",
        "dense FFN cut by channel, the important ones always on",
        "moebench.moe.transforms.taylor:taylor",
        TaylorSplit,
    ),
    Descriptor("structure", "upcycle", "copies of a dense FFN as experts", _STEPS + "upcycled", Upcycle),
]
