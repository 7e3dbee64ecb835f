"""Cases that run once: both sides evaluate, one after the other, and what they say item by item is judged in pairs.

Nothing is timed, so the sides need not take turns; each runs in a worker of its own code, which lives as long as no
case takes it down.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ...contracts import MoebenchError, Status, make_key
from ...results.accuracy_gate import ItemKey, judge_items
from ...results.deterministic import judge_metrics
from ...results.gate import Judged, Skipped
from ...results.verdict import Verdict
from ..ring import Ring, WorkerStartError
from ..sampling import Member, Phases, RingLostError, Sitting
from .config import GateConfig, PairedCase
from .measure import LEFT_OUT
from .moved import moved_once
from .pairs import PairedMember, outcome
from .sides import Side

EVALUATED = ("base", "candidate")


@dataclass
class Evaluated:
    """What the evaluations left."""

    judged: list[Judged] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)


class Evaluations:
    """Runs cases once on both sides. ``left`` is the time that the budget still has, None where there is none."""

    def __init__(
        self,
        sides: Mapping[str, Side],
        plugins: Sequence[str],
        config: GateConfig,
        tell: Callable[[str], None],
        environment: Mapping[str, str] | None = None,
        left: float | None = None,
    ) -> None:
        self.sides, self.plugins, self.config, self.tell = sides, plugins, config, tell
        self.environment = dict(environment or {})
        self.until = None if left is None else time.monotonic() + left
        self.versions: dict[str, Mapping[str, Any]] = {}

    def run(self, cases: Sequence[PairedCase]) -> Evaluated:
        """Evaluate every case on the base, then on the candidate; judge those that both could."""
        found = Evaluated()
        members = [PairedMember(case) for case in cases]
        for side in EVALUATED:
            self._side(side, [member for member in members if member.alive])
        for member in members:
            self._judge(member, found)
        return found

    def _side(self, side: str, members: Sequence[PairedMember]) -> None:
        """Evaluate on one side, beginning anew without a case that takes the worker down."""
        waiting = list(members)
        while waiting:
            if self.until is not None and time.monotonic() > self.until:
                for member in waiting:
                    reason = f"the budget of {self.config.budget:g} s was spent before {side} had evaluated it."
                    member.outcome = (LEFT_OUT, reason)
                return
            try:
                self._in_ring(side, waiting)
            except RingLostError as error:
                lost = next(member for member in waiting if member.members[side] is error.member)
                lost.outcome = outcome(lost)
                waiting.remove(lost)

    def _in_ring(self, side: str, waiting: list[PairedMember]) -> None:
        ring = self._ring(side, waiting)
        try:
            self.versions[side] = ring.versions
            seed = int(make_key([self.config.seed, side])[:8], 16)
            sitting = Sitting(ring, self.config.engine, seed, Phases(), self.tell)
            while waiting and (self.until is None or time.monotonic() <= self.until):
                member = waiting[0]
                sitting.run_once(member.members[side], self._progress(side, member))
                if not member.members[side].alive:
                    member.outcome = outcome(member)
                waiting.pop(0)
        finally:
            ring.close()

    def _ring(self, side: str, waiting: Sequence[PairedMember]) -> Ring:
        source = self.sides[side]
        cases = [member.members[side].case for member in waiting]
        try:
            return Ring(
                [case.environment for case in cases],
                max(case.threads for case in cases),
                self.plugins,
                shared={**self.environment, **source.environment},
                python=source.python,
                cwd=source.cwd,
            )
        except WorkerStartError as error:
            lost = next(one.members[side] for one in waiting if one.members[side].case.environment == error.environment)
            lost.end(Status.CRASHED, str(error))
            raise RingLostError(lost) from None
        except MoebenchError as error:
            raise MoebenchError(f"side {source.name}: {error}") from error

    def _progress(self, side: str, member: PairedMember) -> Callable[[int, int], None]:
        return lambda step, of: self.tell(f"{side}: {member.paired.label}: {step}/{of}")

    def _judge(self, member: PairedMember, found: Evaluated) -> None:
        paired = member.paired
        member.outcome = member.outcome or _other_inputs(member)
        if member.outcome is not None:
            found.skipped.append(Skipped(paired.label, paired.key, *member.outcome))
            return
        base, candidate = (member.members[side] for side in EVALUATED)
        named: dict[str, Any] = {"label": paired.label, "case_key": paired.key, "base_case": paired.base.case_key}
        rows = judge_items(_items(base), _items(candidate), self.config.margins, **named)
        rows += judge_metrics(_metrics(base), _metrics(candidate), self.config.tolerances, **named)
        if not rows:
            reason = "it has neither items nor metrics that are judged; compare its runs with `moebench compare`."
            found.skipped.append(Skipped(paired.label, paired.key, "cannot gate", reason))
        why = moved_once(member, self.versions) if any(one.verdict == Verdict.REGRESSED for one in rows) else ()
        found.judged += [replace(one, moved=why) if one.verdict == Verdict.REGRESSED else one for one in rows]


def _other_inputs(member: PairedMember) -> tuple[str, str] | None:
    base, candidate = (member.members[side] for side in EVALUATED)
    if base.input_sha256 == candidate.input_sha256:
        return None
    return "inputs differ", "inputs differ: the sides were not asked the same thing, so their answers say nothing."


def _items(member: Member) -> dict[ItemKey, float | None]:
    items = (member.facts or {}).get("items", ())
    return {(item["task"], item["item"], item["metric"]): item["value"] for item in items}


def _metrics(member: Member) -> dict[str, float | None]:
    return {metric["name"]: metric["value"] for metric in (member.facts or {}).get("metrics", ())}
