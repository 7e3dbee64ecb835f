"""Parameters of MC-MoE's online dynamic pruning. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from ...contracts import Descriptor
from ..plugins import TopK
from ..shapes import ModelShape
from .dynamic import AnyNumber


@dataclass(frozen=True)
class OnlinePruned(AnyNumber):
    """The model's own top-k without a token's lowest expert where it weighs little (MC-MoE's ODP, arXiv 2410.06270).

    That is where it weighs less than ``beta`` times the token's highest. ``beta`` None is the paper's: the median of
    that ratio on calibration tokens, of each layer its own, so that about half of the tokens lose an expert; a number
    is that of all layers (the released code lists 0.40 to 0.62 for Mixtral). The share ``protect`` of a call's tokens,
    those of the largest |h|_1 times the attention received, keep all; with ``importance="norm"`` the norm alone
    decides, which needs no attention, and with ``importance="random"`` as many are drawn. All look at later tokens, of
    the prompt alone where one is told: with protect=0 the routing is causal. ``by="random"`` prunes as many tokens by
    chance, or each with the probability ``rate`` (which ``ratio`` does not read). ``k`` None is the model's own.
    """

    pipeline: ClassVar[bool] = True

    k: int | None = None
    beta: float | None = None
    protect: float = 0.02
    by: Literal["ratio", "random"] = "ratio"
    importance: Literal["attention", "norm", "random"] = "attention"
    rate: float | None = None

    def __post_init__(self) -> None:
        if self.beta is not None and not 0 <= self.beta < math.inf:
            raise ValueError(f"beta={self.beta} must be a finite number, and not negative")
        if not 0 <= self.protect <= 1:
            raise ValueError(f"protect={self.protect} must lie in [0, 1]")
        if self.rate is not None and not 0 <= self.rate <= 1:
            raise ValueError(f"rate={self.rate} must lie in [0, 1]")

    @property
    def calibrated(self) -> bool:
        """Whether the router is given calibration tokens, from which it learns ``beta``."""
        return self.beta is None and (self.by == "ratio" or self.rate is None)

    @property
    def causal(self) -> bool:
        """Whether later tokens leave earlier ones alone: not where some of a call's tokens are chosen."""
        return self.protect == 0 and (self.by == "ratio" or self.rate is not None)

    @property
    def causal_after_prompt(self) -> bool:
        """Whether, with a prompt told, no token is treated by what follows it beyond the prompt."""
        return self.by == "ratio" or self.rate is not None

    @property
    def beyond_text(self) -> str | None:
        """The attention, where it says which tokens are protected."""
        return "attn" if self.protect > 0 and self.importance == "attention" else None

    def unpruned(self) -> TopK:
        """Return the parameters of the top-k that is pruned."""
        return TopK(self.k)

    def kinds(self, shape: ModelShape) -> tuple[str, ...]:
        """Return ``ffn`` for every expert; ValueError where there is no second one that could be dropped."""
        if self.unpruned().selection(shape).k < 2:
            raise ValueError("a token has one expert and none that could be dropped; prune a routing of k=2 or more")
        return super().kinds(shape)

    def max_k(self, shape: ModelShape) -> int:
        """Return k."""
        return self.unpruned().max_k(shape)


DESCRIPTORS = [
    Descriptor(
        "routing",
        "odp",
        "the model's own top-k without a light lowest expert (MC-MoE)",
        "moebench.moe.routers.online_pruning:build",
        OnlinePruned,
    ),
]
