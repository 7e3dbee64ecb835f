"""Descriptor and parameters of suite ``offload``. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from ..contracts import Descriptor
from .plugins import LayerSuite

MOST_STEPS = 256
"""A turn of a stream is all of its steps, and no turn is longer."""


@dataclass(frozen=True)
class OffloadSuite:
    """A model whose experts lie in a slow tier, decoding ``steps`` tokens for each of ``tokens`` sequences after
    prompts of ``prompt`` tokens.

    A sample is one step: the time per output token (TPOT). Each turn begins anew with an empty cache and the prompts,
    off the clock. Models with text (axes.traffic=recorded) are fed the ``text`` that follows, or what they generate
    greedily; for others the layers run alone on noise, routed by their routers or as the traffic says. The oracle is
    the same run with all experts at hand.
    A layer computes one expert after another, each for all of its tokens, or (``order=token``) one token after
    another. With ``batching`` the tokens of all steps, in an order by chance, wait from the beginning to be put into
    steps: first come first served, or so that a step needs few experts, nobody ``patience`` steps later than in the
    order of coming (Read-ME); this needs a traffic that forces its routing.
    With backends other than ``offload`` all experts are resident. Each measured row of ``offload`` has a predicted one
    of evidence `model` beside it (unless ``predicted`` is false), made from probes of this host and the trace alone.
    """

    prompt: int = 16
    steps: int = 64
    feed: Literal["text", "generated"] = "text"
    order: Literal["expert", "token"] = "expert"
    batching: Literal["none", "first_come", "expert_aware"] = "none"
    patience: int = 4
    predicted: bool = True

    AXES: ClassVar[Mapping[str, Any]] = {
        **LayerSuite.AXES,
        "model": ["smollm2"],
        "backend": ["offload", "eager"],
        "tokens": [1],
        "residency": ["warm"],
    }
    ENGINE: ClassVar[Mapping[str, Any]] = {"seconds": 6.0, "min_calls": 128, "turn_timeout": 900.0}

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= MOST_STEPS or self.prompt < 1:
            raise ValueError(
                f"steps={self.steps} must lie between 1 and {MOST_STEPS}, and prompt={self.prompt} be >= 1"
            )
        if self.patience < 0:
            raise ValueError(f"patience={self.patience} must be at least 0 steps")


DESCRIPTORS = [
    Descriptor(
        "suite",
        "offload",
        "decoding with experts in a slow tier: hit rates, stalls, time per token",
        "moebench.suites.offload_suite:create",
        OffloadSuite,
    ),
]
