"""What a gate found, as plain values: the terminal, JUnit, Markdown, the page and the store all read this."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

from .verdict import Verdict


class Exit(IntEnum):
    """Exit status of ``moebench gate``; 2 is a mistake of the user, as everywhere."""

    NOT_REGRESSED = 0
    REGRESSED = 1
    INCONCLUSIVE = 3
    TOO_NOISY = 4


DOUBTS = {"inconclusive": Exit.INCONCLUSIVE, "noisy": Exit.TOO_NOISY}
"""What ``--fail-on`` may name, and the exit status that it turns into a regression's."""

UNCOMPARED = frozenset({"missing", "inputs differ"})
"""Statuses of cases of the base that the candidate did not run alike: as good as inconclusive."""


@dataclass(frozen=True)
class Judged:
    """One quantity of one case on both sides.

    ``kind``: ``time`` (interleaved turn minima, ``clock`` says which clock), ``metric`` (deterministic) or
    ``accuracy`` (paired items). Values of times are medians of turn minima in ns. ``ratio`` is candidate / base with
    its interval for times; for accuracies ``ratio``, ``lo`` and ``hi`` hold the difference candidate - base instead.
    ``p`` is one-sided against "slower by at most the margin", ``q`` after Benjamini-Hochberg over the cases; of right
    and wrong answers ``p`` is McNemar's, exact and two-sided.
    ``margin`` is the least effect that counts as a regression, ``asked`` the one that must be excluded for "not
    regressed". ``moved`` names what else changed between the sides, first things first; empty where the case did not
    regress.
    """

    label: str
    case_key: str
    base_case: str
    kind: Literal["time", "metric", "accuracy"]
    metric: str
    verdict: Verdict
    reason: str = ""
    clock: str = ""
    base_value: float | None = None
    candidate_value: float | None = None
    unit: str = ""
    ratio: float | None = None
    lo: float | None = None
    hi: float | None = None
    p: float | None = None
    q: float | None = None
    pairs: int = 0
    turns: int = 0
    margin: float = 0.0
    asked: float = 0.0
    moved: tuple[str, ...] = ()


@dataclass(frozen=True)
class Skipped:
    """A case without a verdict, or without one on its time.

    ``status``: ``skipped`` (not in the base, or cannot run), ``missing`` (not in the candidate), ``inputs differ``,
    ``cannot gate``, ``left out`` of the budget, ``broken`` (on the candidate's side alone), or what befell the base.
    """

    label: str
    case_key: str
    status: str
    reason: str


@dataclass(frozen=True)
class Noise:
    """What the A/A check (base against itself, in the same turns) found.

    ``tau`` is the standard deviation of the log-ratio between process pairs, pooled over all cases and floored;
    ``measured`` the same before the floor (None where there are too few pairs). ``detectable`` is the smallest
    slow-down (fraction) that the gate would call regressed in 80 % of cases, ``asked`` what it was asked to exclude.
    """

    tau: float
    measured: float | None
    detectable: float | None
    asked: float
    pairs: int

    @property
    def too_noisy(self) -> bool:
        """Whether the machine cannot tell what was asked."""
        return self.detectable is not None and self.detectable > self.asked


@dataclass(frozen=True)
class GateResult:
    """Everything that a gate found. ``base`` and ``candidate`` name the sides, such as ``HEAD~1 (1a2b3c4)``."""

    run_id: str
    base: str
    candidate: str
    judged: tuple[Judged, ...]
    skipped: tuple[Skipped, ...]
    noise: Noise | None
    seconds: float
    asked_cases: int
    fail_on: Sequence[str] = ()

    def count(self, verdict: Verdict) -> int:
        """Return how many quantities have this verdict."""
        return sum(one.verdict == verdict for one in self.judged)

    @property
    def covered(self) -> int:
        """Number of cases with a verdict on their time or on anything else."""
        return len({one.case_key for one in self.judged})

    @property
    def exit(self) -> Exit:
        """A regression of anything beats a noisy machine, and that beats doubt.

        A case that is wrong, crashed or hung on the candidate's side alone is a regression; see ``Skipped``.
        """
        broken = any(one.status == "broken" for one in self.skipped)
        if broken or self.count(Verdict.REGRESSED):
            return Exit.REGRESSED
        if self.noise is not None and self.noise.too_noisy:
            return Exit.TOO_NOISY
        uncompared = any(one.status in UNCOMPARED for one in self.skipped)
        if self.count(Verdict.INCONCLUSIVE) or uncompared or not self.judged:
            return Exit.INCONCLUSIVE
        return Exit.NOT_REGRESSED

    @property
    def status(self) -> int:
        """The exit status of the command: ``exit``, but a doubt that ``fail_on`` names counts as a regression."""
        return int(Exit.REGRESSED if self.exit in [DOUBTS[name] for name in self.fail_on] else self.exit)
