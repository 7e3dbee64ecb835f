"""Runs a plan: ring after ring, one part for each finished group, and nothing lost when something dies."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..contracts import Case, Flag, Status, make_key
from ..results.parts import blob_row, write_part
from . import rows
from .flags import Limits, flags_of, phases_of
from .plan import Group, Plan
from .progress import Countdown, Progress
from .ring import Ring, WorkerStartError
from .rundir import RunFolder
from .sampling import Member, Phases, RingLostError, Sitting, describe


@dataclass
class Outcome:
    """How a run ended: cases by status, and how many of the ok ones carry a flag."""

    counts: dict[str, int]
    flagged: int
    phases: dict[str, Any]


class Runner:
    """Measures the groups of a plan that the run folder does not hold yet.

    ``limits`` reads the host's probes from the store; it is asked again when the run itself has probed the host.
    """

    def __init__(
        self, plan: Plan, run: RunFolder, plugins: Sequence[str], progress: Progress, limits: Callable[[], Limits]
    ) -> None:
        self.plan, self.run, self.plugins, self.progress = plan, run, list(plugins), progress
        self._read_limits, self.limits = limits, limits()
        self.phases = Phases()
        self.counts: dict[str, int] = {}
        self.flagged = 0

    def execute(self) -> Outcome:
        """Measure every group that is not finished; return the counts of the whole run."""
        started = time.perf_counter()
        for group in self.plan.groups:
            finished = self.run.finished_cases(group.name)
            if finished is not None:
                self._count(finished)
                self.progress.done(len(group.cases), f"{group.name[:12]} is finished already")
                continue
            before = asdict(self.phases)
            tables, logs = self._measure(group)
            for planned in group.refused:
                row = rows.case_row(self.run.run_id, planned.case, Status.SKIPPED, planned.refusal or "")
                rows.merge(tables, {"cases": [row]})
            self._count(tables["cases"])
            first = (group.cases or tuple(planned.case for planned in group.refused))[0]
            blobs = [blob_row(self.run.run_id, first.case_key, name, log) for name, log in logs.items()]
            rows.merge(tables, {"blobs": blobs})
            manifest = {"group": group.name, "run_id": self.run.run_id, "phases": _since(before, asdict(self.phases))}
            write_part(self.run.path, group.name, tables, logs, manifest)
            if first.suite == "roofline":
                self.limits = self._read_limits()
            self.progress.done(len(group.cases), _summary(group, tables))
        wall = time.perf_counter() - started
        return Outcome(self.counts, self.flagged, phases_of(asdict(self.phases), wall))

    def _count(self, cases: Sequence[Mapping[str, Any]]) -> None:
        for row in cases:
            self.counts[row["status"]] = self.counts.get(row["status"], 0) + 1
            self.flagged += bool(row["flags"])

    def _measure(self, group: Group) -> tuple[rows.Tables, dict[str, bytes]]:
        tables: rows.Tables = {}
        logs: dict[str, bytes] = {}
        if not group.cases:
            return tables, logs
        measure = self._once if group.once else self._timed
        for members, names in measure(group.cases, logs):
            flags: list[Flag] = flags_of(members, self.limits) if all(m.alive for m in members) else []
            first = group.piece * self.plan.engine.processes
            found = rows.measured_rows(self.run.run_id, members, flags, names, first)
            if group.piece and members[0].case.case_key == group.cases[0].case_key:
                self._tell_lost_anchor(members)
                found = {"timings": found.get("timings", [])}  # the anchor's row and facts are those of piece 0
            rows.merge(tables, found)
            for member in members:
                if member.traceback:
                    logs[f"traceback-{member.case.case_key}.txt"] = member.traceback.encode()
        return tables, logs

    def _tell_lost_anchor(self, members: Sequence[Member]) -> None:
        """Count and print an anchor that failed in a later piece: its row, in a part that is written, says ok."""
        lost = next((member for member in members if not member.alive), None)
        if lost is not None:
            self.counts[lost.status] = self.counts.get(lost.status, 0) + 1
            self.progress.error(f"moebench: the anchor of a split group {lost.status}: {lost.reason}")

    def _timed(self, cases: Sequence[Case], logs: dict[str, bytes]) -> list[tuple[list[Member], list[str]]]:
        """Measure cases together in ``processes`` fresh rings; whoever took a ring down is tried again alone."""
        together: dict[str, list[Member]] = {case.case_key: [] for case in cases}
        names: dict[str, list[str]] = {case.case_key: [] for case in cases}
        culprits: list[Member] = []
        for process in range(self.plan.engine.processes):
            healthy = [case for case in cases if _healthy(together[case.case_key])]
            members, lost, name = self._sitting(healthy, process, logs)
            culprits += lost
            for member in members + lost:
                together[member.case.case_key].append(member)
                names[member.case.case_key].append(name)
        if len(cases) > 1:
            for culprit in culprits:
                key = culprit.case.case_key
                together[key], names[key] = self._alone(culprit.case, logs)
                if _healthy(together[key]):
                    together[key][
                        -1
                    ].reason = f"measured alone; beside the others it {culprit.status}: {culprit.reason}"
        return [(together[case.case_key], names[case.case_key]) for case in cases]

    def _alone(self, case: Case, logs: dict[str, bytes]) -> tuple[list[Member], list[str]]:
        tries: list[Member] = []
        names: list[str] = []
        for process in range(self.plan.engine.processes):
            members, lost, name = self._sitting([case], process, logs, alone=True)
            tries += members + lost
            names.append(name)
            if lost:
                break
        return tries, names

    def _sitting(
        self, cases: Sequence[Case], process: int, logs: dict[str, bytes], alone: bool = False
    ) -> tuple[list[Member], list[Member], str]:
        """Measure cases in one ring, beginning anew without the culprit each time a worker is lost."""
        lost: list[Member] = []
        while True:
            left = [case for case in cases if case.case_key not in {member.case.case_key for member in lost}]
            members = [Member(case, "alone" if alone else "interleaved") for case in left]
            name = make_key([self.run.run_id, [case.case_key for case in left], process, alone])[:16]
            if not members:
                return [], lost, name
            try:
                self._with_ring(left, name, logs, lambda sitting, m=members: sitting.measure(m))  # type: ignore[misc]
                return members, lost, name
            except RingLostError as error:
                lost.append(error.member)
                self.progress.line(f"  {describe(error.member.case)}: {error.member.status}, {error.member.reason}")

    def _with_ring(
        self, cases: Sequence[Case], name: str, logs: dict[str, bytes], action: Callable[[Sitting], None]
    ) -> None:
        started = time.perf_counter()
        try:
            ring = Ring([case.environment for case in cases], cases[0].threads, self.plugins)
        except WorkerStartError as error:
            raise RingLostError(_never_started(cases, error)) from None
        self.phases.add("spawn", started)
        seed = int(make_key([self.plan.seed, name])[:8], 16)
        try:
            action(Sitting(ring, self.plan.engine, seed, self.phases, self.progress.tell))
        finally:
            text = ring.log()
            if text:
                logs[f"worker-{name}-{len(logs)}.log"] = text.encode()
            ring.close()

    def _once(self, cases: Sequence[Case], logs: dict[str, bytes]) -> list[tuple[list[Member], list[str]]]:
        """Run each case once; one worker serves as long as it lives."""
        results: list[tuple[list[Member], list[str]]] = []
        waiting = list(cases)
        while waiting:
            name = make_key([self.run.run_id, [case.case_key for case in waiting], "once"])[:16]
            try:
                self._with_ring(waiting, name, logs, lambda sitting: self._once_in(sitting, waiting, results))
            except RingLostError as error:
                results.append(([error.member], [""]))
                waiting.remove(error.member.case)
        return results

    def _once_in(self, sitting: Sitting, waiting: list[Case], results: list[tuple[list[Member], list[str]]]) -> None:
        while waiting:
            member = Member(waiting[0])
            what, countdown = describe(member.case), Countdown()

            def told(step: int, of: int, what: str = what, countdown: Countdown = countdown) -> None:
                self.progress.tell(f"{what}: {step}/{of}{countdown.left(step, of)}")

            sitting.run_once(member, told)
            results.append(([member], [""]))
            waiting.pop(0)


def _never_started(cases: Sequence[Case], error: WorkerStartError) -> Member:
    member = Member(next(case for case in cases if case.environment == error.environment))
    member.end(Status.CRASHED, str(error))
    return member


def _since(before: Mapping[str, float], now: Mapping[str, float]) -> dict[str, float]:
    return {name: now[name] - before[name] for name in now}


def _healthy(members: Sequence[Member]) -> bool:
    return all(member.alive for member in members)


def _summary(group: Group, tables: rows.Tables) -> str:
    statuses = [row["status"] for row in tables.get("cases", [])]
    counts = ", ".join(f"{statuses.count(s)} {s}" for s in sorted(set(statuses)))
    first = group.cases[0] if group.cases else group.refused[0].case
    return f"{first.suite} {first.model} T={first.tokens} {first.dtype}: {counts}"
