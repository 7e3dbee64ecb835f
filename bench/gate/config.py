"""The settings of a gate, and what one of its cases is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ...contracts import Case, MoebenchError
from ...results import accuracy_gate
from ...results.accuracy_gate import Margin
from ...results.deterministic import Tolerance, with_margins
from ...results.judge import Rule
from ..config import EngineConfig

FEWEST_PAIRS = 5
"""Process pairs before the first verdict: process pairs of equal code differ by 1 to 2 %, and nothing else averages
it."""

MOST_LOOKS = 3


@dataclass(frozen=True)
class GateConfig:
    """How a gate measures and judges. Times in seconds.

    ``seconds``: what the turns of a case may take over the first five process pairs: timed and untimed calls, checks,
    on all three sides. Starting workers and warming up come on top.
    ``max_seconds``: the same where a case stays undecided and gets five more pairs, once or twice. ``budget``: wall
    time of measuring; a process pair that began is finished. ``margin`` and ``detect`` are fractions: a slow-down above
    ``margin`` is a regression, one of ``detect`` must be excluded for "not regressed". ``metric_margins`` are fractions
    by which a deterministic metric may move, by its name; ``item_margins`` what the mean of a metric of items may lose,
    in its own unit.
    """

    seconds: float = 10.0
    max_seconds: float = 30.0
    budget: float | None = None
    margin: float = 0.01
    detect: float = 0.05
    seed: int = 0
    warmup_seconds: float = 0.3
    fail_on: Sequence[str] = ()
    devices: Sequence[str] = ()
    metric_margins: Mapping[str, float] = field(default_factory=dict)
    item_margins: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("seconds", "max_seconds"):
            if not 0 < getattr(self, name) < math.inf:
                raise MoebenchError(f"--{name.replace('_', '-')} must be a number of seconds greater than 0.")
        if self.budget is not None and not 0 < self.budget < math.inf:
            raise MoebenchError("--budget must be a time greater than 0, such as 90s, 8m or 1h.")
        if not 0 <= self.margin < self.detect < 1:
            raise MoebenchError(
                f"--margin {self.margin} and --detect {self.detect} must have 0 <= margin < detect < 1."
            )
        try:
            with_margins(self.metric_margins)
        except ValueError as error:
            raise MoebenchError(f"--metric-margin: {error}") from error
        try:
            accuracy_gate.with_margins(self.item_margins)
        except ValueError as error:
            raise MoebenchError(f"--item-margin: {error}") from error

    @property
    def tolerances(self) -> dict[str, Tolerance]:
        """What deterministic metrics may move by."""
        return with_margins(self.metric_margins)

    @property
    def margins(self) -> dict[str, Margin]:
        """What metrics of items may lose."""
        return accuracy_gate.with_margins(self.item_margins)

    @property
    def looks(self) -> int:
        """How often an undecided case is judged at most."""
        return max(1, min(MOST_LOOKS, int(self.max_seconds // self.seconds)))

    @property
    def pairs(self) -> int:
        """Process pairs that a case may have at most."""
        return FEWEST_PAIRS * self.looks

    @property
    def pair_seconds(self) -> float:
        """What the turns of a case may take in one process pair."""
        return self.seconds / FEWEST_PAIRS

    @property
    def rule(self) -> Rule:
        """The rule of the verdicts."""
        return Rule(self.margin, self.detect, self.looks)

    @property
    def engine(self) -> EngineConfig:
        """The settings of the sittings."""
        return EngineConfig(processes=1, seconds=self.pair_seconds, warmup_seconds=self.warmup_seconds)


@dataclass(frozen=True)
class PairedCase:
    """What the two sides run: the same case, or the same method on two backends."""

    label: str
    base: Case
    candidate: Case

    @property
    def key(self) -> str:
        """Key of the candidate's case, by which the store knows the comparison."""
        return self.candidate.case_key

    def case(self, side: str) -> Case:
        """Return the case of side ``base``, ``again`` or ``candidate``."""
        return self.candidate if side == "candidate" else self.base
