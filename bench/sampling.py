"""One sitting: the cases of a group, prepared in a ring, checked, warmed up and sampled in random turns.

What is compared is sampled here together: in each round every case gets one turn, in random order. A turn is as many
calls as make at least ``TURN_NS``; the oracle checks the outputs of each turn's last round through the steps.
"""

from __future__ import annotations

import functools
import math
import random
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ..contracts import Case, Check, Metric, Status
from ..results.statistics import median_interval, steady_start
from .config import EngineConfig
from .gpu.watch import watched
from .ring import Ring, WorkerDiedError, WorkerError, WorkerTimeoutError

TURN_NS = 100_000
"""A turn takes at least this long, so that its minimum is not the clock's resolution."""

MAX_CALLS = 256

FIRST_CALLS = 3
"""Calls before the first check, as many as there are different inputs."""

FEWEST_CALLS = 6
"""So many samples are needed for an interval of the median at all (95 %)."""

PATIENCE = 4
"""A group that is short of ``min_calls`` goes on for this many times its budget at most."""

LOOK_GROWTH = 1.05
"""Precision is looked at again when there are this many times the samples: a look costs a sort, and invites chance."""

STEADY_WINDOW = 5


class RingLostError(Exception):
    """A worker died or hung; ``member`` was its last trial, and everybody else needs a new ring."""

    def __init__(self, member: Member) -> None:
        super().__init__(member.reason)
        self.member = member


@dataclass
class Member:
    """A case on its way through one sitting; ``mode`` says whether it had others beside it.

    ``device`` are facts of the GPU that times it, ``throttled`` counts the sampled turns beside which its clocks were
    held down, by reason, and ``sitting`` is what its driver told of the whole sitting.
    """

    case: Case
    mode: Literal["interleaved", "alone"] = "interleaved"
    status: Status = Status.OK
    reason: str = ""
    steady: bool = True
    calls: int = 1
    steps: int = 1
    stream: bool = False
    next_step: int = 0
    wall_ns: list[int] = field(default_factory=list)
    cpu_ns: list[int] = field(default_factory=list)
    device_ns: list[int] = field(default_factory=list)
    turns: list[int] = field(default_factory=list)
    switches: int = 0
    throttled: dict[str, int] = field(default_factory=dict)
    device: dict[str, Any] | None = None
    sitting: list[Metric] = field(default_factory=list)
    check: Check | None = None
    flips: int = 0
    executed: dict[str, Any] | None = None
    input_sha256: str | None = None
    facts: dict[str, Any] | None = None
    cost: dict[str, Any] | None = None
    seconds: float = 0.0
    peak_rss: int | None = None
    traceback: str = ""

    @property
    def call_ns(self) -> list[int]:
        """The time of each call on the clock that counts: the device's where one times it, else wall."""
        return self.device_ns if self.device is not None else self.wall_ns

    @property
    def alive(self) -> bool:
        """Whether it is still to be measured."""
        return self.status == Status.OK

    def end(self, status: Status, reason: str) -> None:
        """Take the member out: it keeps its reason and loses its samples."""
        self.status, self.reason = status, reason
        self.wall_ns, self.cpu_ns, self.device_ns, self.turns = [], [], [], []


@dataclass
class Phases:
    """Where the wall time of a run went, in seconds; what is left over is the engine's own share.

    ``spawn``: starting workers and their imports. ``prepare``: loading, compiling, references. ``warm``: the
    untimed call before a turn of warm weights. ``verify``: oracle checks, with fresh inputs and outputs full of NaN
    before each turn. ``calls``: timed calls. ``once``: cases without clocks.
    """

    spawn: float = 0.0
    prepare: float = 0.0
    warm: float = 0.0
    verify: float = 0.0
    calls: float = 0.0
    once: float = 0.0

    def add(self, name: str, started: float) -> None:
        """Count the time since ``started`` (perf_counter) to a phase."""
        setattr(self, name, getattr(self, name) + time.perf_counter() - started)


class Sitting:
    """Measures members in one ring. Raises RingLostError when a worker is lost."""

    def __init__(
        self, ring: Ring, engine: EngineConfig, seed: int, phases: Phases, tell: Callable[[str], None]
    ) -> None:
        self.ring, self.engine, self.phases, self.tell = ring, engine, phases, tell
        self._random = random.Random(seed)
        self._next_look = 0.0

    def measure(self, members: Sequence[Member]) -> None:
        """Take every member from prepare to its samples, or to the status that stopped it."""
        for member in members:
            self.guarded(member, self.prepare)
        for member in _alive(members):
            self.guarded(member, self.first_check)
        for member in _alive(members):
            self.guarded(member, self.warm_up)
        with watched(next((member.device for member in _alive(members)), None)) as told:
            self._sample(members)
        for member in members:
            member.sitting = told
        for member in _alive(members):
            self.guarded(member, self.collect)

    def guarded(self, member: Member, action: Callable[[Member], None]) -> None:
        """Do something about a member that is alive; an error ends it with a status, a lost worker ends the ring."""
        if not member.alive:
            return
        try:
            action(member)
        except WorkerError as error:
            member.end(Status.FAILED, str(error))
            member.traceback = error.traceback
        except WorkerDiedError as error:
            member.end(Status.CRASHED, str(error))
            raise RingLostError(member) from None
        except WorkerTimeoutError as error:
            member.end(Status.TIMED_OUT, str(error))
            raise RingLostError(member) from None

    def _ask(self, member: Member, op: str, limit: str, **arguments: Any) -> dict[str, Any]:
        """Send a request about the member's trial; ``limit`` names the engine's setting that bounds the answer."""
        worker = self.ring.worker(member.case.environment)
        try:
            return worker.request(op, getattr(self.engine, limit), trial=member.case.case_key, **arguments)
        except WorkerTimeoutError as error:
            remedy = f"raise engine.{limit} if it only needs longer"
            raise WorkerTimeoutError(f"{str(error).rstrip('.')}; {remedy}.") from None

    def prepare(self, member: Member) -> None:
        """Have the trial made ready; a backend that would do other than the plan says ends here."""
        started = time.perf_counter()
        self.tell(f"preparing {describe(member.case)}")
        reply = self._ask(member, "prepare", "prepare_timeout", case=member.case.to_json())
        self.phases.add("prepare", started)
        member.steps, member.executed = reply["steps"], reply["executed"]
        member.stream = reply.get("stream", False)
        member.input_sha256, member.seconds = reply["input_sha256"], reply["seconds"]
        member.device = reply.get("device")
        fallback = fallback_reason(member.case, reply["executed"], reply["seen"])
        if fallback:
            member.end(Status.FELL_BACK, fallback)

    def turn(self, member: Member, calls: int) -> dict[str, Any]:
        """Let the trial take a turn of ``calls`` calls and return the worker's reply (see ``protocol``)."""
        reply = self._ask(member, "turn", "turn_timeout", first_step=member.next_step, calls=calls)
        self.phases.calls += sum(reply["ns"]) / 1e9 + reply.get("wait_s", 0.0)
        self.phases.warm += reply["warm_s"]
        self.phases.verify += reply["ready_s"]
        member.next_step += calls
        return reply

    def verify(self, member: Member) -> None:
        """Check the outputs of the last turn; a wrong one ends the member."""
        started = time.perf_counter()
        reply = self._ask(member, "verify", "prepare_timeout")
        self.phases.add("verify", started)
        check = Check(**reply["check"])
        member.flips += check.flips
        if member.check is None or (check.error or 0.0) > (member.check.error or 0.0) or not check.ok:
            member.check = check
        if not check.ok:
            member.end(Status.WRONG, check.reason or "the output differs from the reference")

    def first_check(self, member: Member) -> None:
        """Check a first output of every input, before any time is spent on the member."""
        self.turn(member, member.steps if member.stream else min(member.steps, FIRST_CALLS))
        self.verify(member)

    def warm_up(self, member: Member) -> None:
        """Take turns until two neighbouring windows of turn minima agree; give up after ``warmup_seconds``.

        A stream begins each turn from the same state, which it makes itself: the turn of the first check was enough.
        """
        if member.stream:
            member.calls = member.steps
            return
        minima: list[int] = []
        spent = 0.0
        while member.alive:
            reply = self.turn(member, member.calls)
            ns = reply["ns"] if member.device is None else reply["device_ns"]
            spent += sum(ns) / 1e9
            minima.append(min(ns))
            wanted = math.ceil(TURN_NS / max(1, statistics.median(ns)))
            member.calls = whole_rounds(max(_least_calls(member.case), wanted), member.steps)
            if _steady(minima, self.engine.steady_tolerance):
                return
            if spent > self.engine.warmup_seconds and len(minima) >= 2 * STEADY_WINDOW:
                member.steady = False
                return

    def _sample(self, members: Sequence[Member]) -> None:
        budget = self.engine.seconds * max(1, len(list(_alive(members))))
        spent = 0.0
        number = 0
        while not self._enough(members, spent, budget):
            order = list(_alive(members))
            self._random.shuffle(order)
            for member in order:
                self.guarded(member, functools.partial(self.sampled_turn, number=number))
                spent += sum(member.call_ns[-member.calls :]) / 1e9
            number += 1
            self.tell(f"sampling {len(order)} cases, round {number}")

    def sampled_turn(self, member: Member, number: int) -> None:
        """Take turn ``number``, check its outputs, and keep its samples only then."""
        reply = self.turn(member, member.calls)
        self.verify(member)
        if member.alive:
            member.wall_ns += reply["ns"]
            member.cpu_ns += reply["cpu_ns"]
            member.device_ns += reply.get("device_ns") or []
            member.turns += [number] * len(reply["ns"])
            member.switches += reply["switches"]
            for reason in reply.get("throttled", ()):
                member.throttled[reason] = member.throttled.get(reason, 0) + 1

    def _enough(self, members: Sequence[Member], spent: float, budget: float) -> bool:
        alive = list(_alive(members))
        if not alive:
            return True
        fewest = min(len(member.wall_ns) for member in alive)
        if fewest < self.engine.min_calls:
            return fewest >= FEWEST_CALLS and spent >= PATIENCE * budget
        if spent >= budget or fewest < self._next_look:
            return spent >= budget
        self._next_look = LOOK_GROWTH * fewest
        return all(precise(member.call_ns, self.engine.precision) for member in alive)

    def collect(self, member: Member) -> None:
        """Take the trial's facts; a backend that left the plan when it was called ends here."""
        reply = self._ask(member, "facts", "prepare_timeout")
        executed = reply["facts"]["executed"]
        fallback = fallback_reason(member.case, executed, ())
        if fallback:  # it kept to the plan when it was prepared, and left it when it was called
            member.executed = executed
            member.end(Status.FELL_BACK, fallback)
            return
        member.facts, member.cost, member.peak_rss = reply["facts"], reply["cost"], reply["rss"]

    def run_once(self, member: Member, on_progress: Callable[[int, int], None]) -> None:
        """Run a case of protocol ``once``: every step once, with progress, and no timings; then free it."""
        self.guarded(member, self.prepare)
        self.guarded(member, lambda m: self._steps(m, on_progress))
        self.guarded(member, self.collect)
        self.guarded(member, self._close)

    def _close(self, member: Member) -> None:
        self._ask(member, "close", "prepare_timeout")

    def _steps(self, member: Member, on_progress: Callable[[int, int], None]) -> None:
        started = time.perf_counter()
        reply = self._ask(member, "run_once", "once_timeout", on_progress=on_progress)
        self.phases.add("once", started)
        member.seconds = reply["seconds"]
        member.check = Check(**reply["check"])
        member.flips = member.check.flips
        if not member.check.ok:
            member.end(Status.WRONG, member.check.reason or "the result failed its check")


def _alive(members: Iterable[Member]) -> Iterable[Member]:
    return [member for member in members if member.alive]


def _least_calls(case: Case) -> int:
    """Return the calls of the shortest turn: with warm weights each turn has an untimed call, which two may share."""
    return 2 if case.residency == "warm" else 1


def whole_rounds(calls: int, steps: int) -> int:
    """Return ``calls``, at most MAX_CALLS; where they are more than ``steps``, a multiple of it, mostly rounded up.

    The inputs change after each round through the steps, and the outputs of the last round are checked.
    """
    if min(calls, MAX_CALLS) <= steps:
        return min(calls, MAX_CALLS)
    return min(math.ceil(calls / steps), MAX_CALLS // steps) * steps


def _steady(minima: Sequence[int], tolerance: float) -> bool:
    return steady_start(minima[-2 * STEADY_WINDOW :], STEADY_WINDOW, tolerance) is not None


def precise(ns: Sequence[int], precision: float) -> bool:
    """Whether the 95 % interval of the median lies within ``precision`` of it, on either side."""
    interval = median_interval(ns)
    if interval.value is None or interval.lo is None or interval.hi is None:
        return False
    return max(interval.hi - interval.value, interval.value - interval.lo) <= precision * interval.value


def fallback_reason(case: Case, executed: dict[str, Any] | None, seen: Sequence[str]) -> str:
    """Return the sentence for a backend that did other than the plan said, or an empty string."""
    plan = case.execution
    if executed is not None and executed["weights"] != plan.weights:
        return f"the plan says weights={plan.weights}, the backend executed {executed['weights']}."
    if executed is not None and executed["sparse"] != plan.sparse:
        return f"the plan says sparse={plan.sparse}, the backend executed {executed['sparse']}."
    if seen:
        return f"the plan excludes {', '.join(seen)}, and an untimed call used it."
    return ""


def describe(case: Case) -> str:
    """Return a case in a few words, for progress lines."""
    parts = [case.suite, case.model.name, case.routing.name]
    parts += [c.name for c in (case.quantization, case.sparsity) if c.name != "none"]
    return f"{' '.join(parts)} T={case.tokens} {case.dtype} on {case.backend.name}"
