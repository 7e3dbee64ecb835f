"""One process pair: fresh workers of base, base again and candidate, whose cases take turns on the same core.

``again`` is the base a second time, in a process of its own: its ratios to ``base`` are A/A, taken in the very turns
that are judged. All sides make the same calls with the same inputs in a turn; the order of cases and sides is random.
"""

from __future__ import annotations

import functools
import random
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...contracts import MoebenchError, Status
from ...results.judge import Minima
from ...results.statistics import median_se
from .. import sketch
from ..ring import Ring, WorkerError, WorkerStartError
from ..sampling import Member, Phases, RingLostError, Sitting
from .config import GateConfig, PairedCase
from .sides import Side

SIDES = ("base", "again", "candidate")

FEWEST_TURNS = 16

PRECISE = 0.005
"""A case has enough turns of a pair when the standard error of its log-ratio is below this: a third of tau's floor,
so that more turns would narrow an interval by 6 % at most. The rule looks at the spread alone, never at the effect."""


@dataclass
class PairedMember:
    """A case in one process pair: a member on each side; ``spent`` is the seconds that its turns took so far."""

    paired: PairedCase
    members: dict[str, Member] = field(init=False)
    outcome: tuple[str, str] | None = None
    rounds: int = 0
    spent: float = 0.0

    def __post_init__(self) -> None:
        self.members = {side: Member(self.paired.case(side)) for side in SIDES}

    @property
    def alive(self) -> bool:
        """Whether it is still to be measured."""
        return self.outcome is None

    def minima(self) -> dict[str, Minima]:
        """Return turn minima by clock and side; the clock to judge by comes first."""
        clocks = clocks_of(self.members)
        return {clock: {side: turn_minima(self.members[side], clock) for side in SIDES} for clock in clocks}


def clocks_of(members: Mapping[str, Member]) -> list[str]:
    """Return the clocks of the sides of a case, the one to judge by first.

    A device's own clock where every side has one (alone where the engine times by it: the host then only launches); CPU
    time where one thread computes, since others cannot stretch it; else wall.
    """
    if all(member.device is not None for member in members.values()):
        return ["device"]
    if all(len(member.device_ns) == len(member.wall_ns) > 0 for member in members.values()):
        return ["device", "wall"]
    on_one_thread = all(one.case.threads == 1 and one.case.device == "cpu" for one in members.values())
    return ["cpu", "wall"] if on_one_thread else ["wall"]


def turn_minima(member: Member, clock: str) -> list[int]:
    """Return the shortest call of each turn in ns, in the order of turns; at least 1 ns."""
    shortest: dict[int, int] = {}
    for turn, ns in zip(member.turns, getattr(member, f"{clock}_ns"), strict=True):
        shortest[turn] = min(ns, shortest.get(turn, ns))
    return [max(1, ns) for ns in shortest.values()]


class ProcessPair:
    """Measures cases once in fresh workers. ``sides`` names base and candidate; cases that end carry an outcome."""

    def __init__(
        self,
        sides: Mapping[str, Side],
        plugins: Sequence[str],
        config: GateConfig,
        seed: int,
        shared: Mapping[str, str],
        cores: Sequence[int] | None,
        tell: Callable[[str], None],
    ) -> None:
        self.sides = {"base": sides["base"], "again": sides["base"], "candidate": sides["candidate"]}
        self.plugins, self.config, self.tell = plugins, config, tell
        self.shared, self.cores = shared, cores
        self.phases = Phases()
        self.versions: dict[str, dict[str, Any]] = {}
        self._random = random.Random(seed)
        self._sittings: dict[str, Sitting] = {}

    def measure(self, cases: Sequence[PairedCase]) -> list[PairedMember]:
        """Measure every case; where one takes a worker down, the others begin anew without it."""
        ended: list[PairedMember] = []
        while True:
            keys = {member.paired.key for member in ended}
            members = [PairedMember(case) for case in cases if case.key not in keys]
            if not members:
                return ended
            try:
                self._in_rings(members)
                return members + ended
            except RingLostError as error:
                lost = next(m for m in members if any(one is error.member for one in m.members.values()))
                lost.outcome = outcome(lost)
                ended.append(lost)

    def _in_rings(self, members: Sequence[PairedMember]) -> None:
        rings: dict[str, Ring] = {}
        try:
            self._start(rings, members)
            self.versions = {side: ring.versions for side, ring in rings.items()}
            seeds = {side: self._random.getrandbits(32) for side in SIDES}
            self._sittings = {
                side: Sitting(rings[side], self.config.engine, seeds[side], self.phases, self.tell) for side in SIDES
            }
            self._prepare(members)
            self._sample(members)
            for member in _alive(members):
                self._each(member, "collect")
        finally:
            for ring in rings.values():
                ring.close()

    def _start(self, rings: dict[str, Ring], members: Sequence[PairedMember]) -> None:
        """Start the workers of all sides; they import side by side, which is most of a process pair's time.

        They are started by this thread, since the kernel ends a worker with the thread that started it.
        """
        for side in SIDES:
            rings[side] = self._ring(side, members)
        with ThreadPoolExecutor(len(SIDES)) as pool:
            greeted = {side: pool.submit(rings[side].hello) for side in SIDES}
        for side, future in greeted.items():
            try:
                future.result()
            except WorkerStartError as error:
                own = [member.members[side] for member in members]
                member = next(one for one in own if one.case.environment == error.environment)
                member.end(Status.CRASHED, str(error))
                raise RingLostError(member) from None
            except MoebenchError as error:
                raise MoebenchError(f"side {self.sides[side].name}: {error}") from error

    def _ring(self, side: str, members: Sequence[PairedMember]) -> Ring:
        source = self.sides[side]
        cases = [member.members[side].case for member in members]
        return Ring(
            [case.environment for case in cases],
            cases[0].threads,
            self.plugins,
            shared={**self.shared, **source.environment},
            python=source.python,
            cwd=source.cwd,
            cores=self.cores,
            greet=False,
        )

    def _each(self, member: PairedMember, action: str) -> None:
        """Do something on every side of a case, base first: what fails there too is no fault of the candidate."""
        for side in SIDES:
            sitting = self._sittings[side]
            sitting.guarded(member.members[side], getattr(sitting, action))
        if not all(one.alive for one in member.members.values()):
            member.outcome = outcome(member)

    def _prepare(self, members: Sequence[PairedMember]) -> None:
        for action in ("prepare", "first_check", "warm_up"):
            for member in _alive(members):
                self._each(member, action)
                if action == "prepare" and member.alive:
                    member.outcome = _other_inputs(member)
                if action == "first_check" and member.alive:
                    member.outcome = self._other_outputs(member)
        for member in _alive(members):
            calls = max(one.calls for one in member.members.values())
            for one in member.members.values():
                one.calls, one.next_step = calls, 0

    def _other_outputs(self, member: PairedMember) -> tuple[str, str] | None:
        """Compare the outputs of the first calls; a base of a revision without sketches is told by its own oracle."""
        found: dict[str, dict[str, Any] | None] = {}
        for side in ("base", "candidate"):
            ask = functools.partial(self._sketch, side=side, found=found)
            self._sittings[side].guarded(member.members[side], ask)
        if not all(one.alive for one in member.members.values()):
            return outcome(member)
        base, candidate = found["base"], found["candidate"]
        return None if base is None or candidate is None else compare_sketches(base, candidate, member)

    def _sketch(self, one: Member, side: str, found: dict[str, dict[str, Any] | None]) -> None:
        worker = self._sittings[side].ring.worker(one.case.environment)
        try:
            reply = worker.request("sketch", self.config.engine.prepare_timeout, trial=one.case.case_key)
        except WorkerError as error:
            if "KeyError: 'sketch'" not in str(error):
                raise
            found[side] = None
            return
        found[side] = reply["sketch"]

    def _sample(self, members: Sequence[PairedMember]) -> None:
        number = 0
        while order := [member for member in _alive(members) if not self._enough(member)]:
            self._random.shuffle(order)
            for member in order:
                self._turn(member, number)
            number += 1
            self.tell(f"turn {number} of {len(order)} cases")

    def _turn(self, member: PairedMember, number: int) -> None:
        began = time.perf_counter()
        for side in self._random.sample(SIDES, len(SIDES)):
            sitting = self._sittings[side]
            sitting.guarded(member.members[side], functools.partial(sitting.sampled_turn, number=number))
            if not member.members[side].alive:
                member.outcome = outcome(member)
                return
        member.rounds += 1
        member.spent += time.perf_counter() - began

    def _enough(self, member: PairedMember) -> bool:
        """Whether the case has had its time, or more turns would tell nothing more."""
        if member.rounds < FEWEST_TURNS:
            return False
        if member.spent >= self.config.pair_seconds:
            return True
        if member.rounds % 4:
            return False
        return all(median_se(ratios) <= PRECISE for ratios in _log_ratios(member))


def _log_ratios(member: PairedMember) -> list[np.ndarray]:
    """Return the log-ratios candidate / base and again / base on the clock that is judged."""
    minima = next(iter(member.minima().values()))
    base = np.log(np.asarray(minima["base"], float))
    return [np.log(np.asarray(minima[side], float)) - base for side in ("candidate", "again")]


def _alive(members: Sequence[PairedMember]) -> list[PairedMember]:
    return [member for member in members if member.alive]


def _other_inputs(member: PairedMember) -> tuple[str, str] | None:
    base, candidate = member.members["base"], member.members["candidate"]
    if base.input_sha256 == candidate.input_sha256:
        return None
    return "inputs differ", "inputs differ: the sides do not compute the same thing, so their times say nothing."


def compare_sketches(
    base: Mapping[str, Any], candidate: Mapping[str, Any], member: PairedMember
) -> tuple[str, str] | None:
    """Return the outcome for outputs that differ or that are none; decisions at a threshold may flip, and are told."""
    if any(one is None for one in (*base.values(), *candidate.values())):
        reason = "the callable returns nothing that both sides could be compared by; return its result."
        return "cannot gate", reason
    if any(one.flips for one in member.members.values()):
        return None
    for step in base:
        found = sketch.difference(base[step], candidate[step]) if step in candidate else ""
        if found:
            return "broken", f"the outputs of the two sides have {found}, so one of them is wrong."
    return None


def outcome(member: PairedMember) -> tuple[str, str]:
    """Return (status, reason) of a case that ended on a side: ``broken`` where only the candidate's ended.

    A case that the base's sources do not know is skipped; so is one that fails on the base itself. One that only the
    candidate's do not know is ``missing``, which is a doubt: somebody may have taken it away with the bug in it.
    """
    for side, name in (("base", "base"), ("again", "base"), ("candidate", "candidate")):
        one = member.members[side]
        if one.alive:
            continue
        if one.status == Status.FAILED and one.reason.startswith("unknown "):
            return "missing" if side == "candidate" else "skipped", f"not in {name}: {one.reason}"
        if side == "candidate":
            return "broken", f"{one.status} on the candidate's side alone: {one.reason}"
        return str(one.status), f"{one.status} on the base's side: {one.reason}"
    return "failed", "ended for no reason that is known."
