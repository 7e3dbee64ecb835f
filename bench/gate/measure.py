"""Process pair after process pair, until every case is decided, out of its time, or the machine is too noisy."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from ...contracts import make_key
from ...results.gate import Judged, Noise
from ...results.judge import CaseTurns, judge_times, noise_of, withdrawn
from ...results.verdict import Verdict
from ..ring import ring_cores
from .config import FEWEST_PAIRS, GateConfig, PairedCase
from .pairs import PairedMember, ProcessPair
from .sides import Side

LEFT_OUT = "left out"
"""Status of a case for whose times the budget had no room; its deterministic metrics may have been told already."""


@dataclass
class Measured:
    """What measuring left: members of every process pair by case, and what ended without a verdict."""

    turns: dict[str, CaseTurns] = field(default_factory=dict)
    members: dict[str, list[PairedMember]] = field(default_factory=dict)
    ended: dict[str, tuple[str, str]] = field(default_factory=dict)
    judged: dict[str, Judged] = field(default_factory=dict)
    noise: dict[str, Noise] = field(default_factory=dict)
    versions: dict[str, dict[str, object]] = field(default_factory=dict)

    @property
    def worst_noise(self) -> Noise | None:
        """The noise of the clock that most verdicts stand on; None where nothing was measured."""
        first = [case.clocks[0] for case in self.turns.values() if case.clocks]
        return self.noise[max(set(first), key=first.count)] if first and self.noise else None


class Measurement:
    """Measures batches of cases on one or more devices. ``tell`` shows progress."""

    def __init__(
        self,
        sides: Mapping[str, Side],
        plugins: Sequence[str],
        config: GateConfig,
        tell: Callable[[str], None],
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.sides, self.plugins, self.config, self.tell = sides, plugins, config, tell
        self.environment = dict(environment or {})
        self.found = Measured()
        self._lock = threading.Lock()
        self._started = time.monotonic()

    def run(self, batches: Sequence[Sequence[PairedCase]]) -> Measured:
        """Measure batch after batch; a batch for which the budget has no room is left out."""
        slowest = 0.0
        for batch in batches:
            left = self._left()
            if left is not None and (left <= 0 or slowest > left):
                self._leave_out(batch)
                continue
            began = time.monotonic()
            self._batch(batch)
            slowest = max(slowest, time.monotonic() - began)
        return self.found

    def _left(self) -> float | None:
        budget = self.config.budget
        return None if budget is None else budget - (time.monotonic() - self._started)

    def _leave_out(self, cases: Sequence[PairedCase]) -> None:
        for case in cases:
            reason = f"the budget of {self.config.budget:g} s was spent before it had {FEWEST_PAIRS} process pairs."
            self.found.ended[case.key] = (LEFT_OUT, reason)

    def _batch(self, batch: Sequence[PairedCase]) -> None:
        for case in batch:
            self.found.turns[case.key] = CaseTurns(case.label, case.key, case.base.case_key)
        longest = 0.0
        for number in range(self.config.pairs):
            waiting = [case for case in batch if self._undecided(case.key)]
            left = self._left()
            if not waiting or (left is not None and longest > left):
                break
            began = time.monotonic()
            self._pair(waiting, number)
            longest = max(longest, time.monotonic() - began)
            if self._too_noisy(waiting):
                self._withdraw(waiting)
                break
            if (number + 1) % FEWEST_PAIRS == 0:
                self._judge(waiting)
        self._leave_out([case for case in batch if self._unjudged(case.key)])

    def _undecided(self, key: str) -> bool:
        judged = self.found.judged.get(key)
        return key not in self.found.ended and (judged is None or judged.verdict == Verdict.INCONCLUSIVE)

    def _unjudged(self, key: str) -> bool:
        return key not in self.found.ended and key not in self.found.judged

    def _judge(self, waiting: Sequence[PairedCase]) -> None:
        """Judge the cases that are not decided yet; a verdict that was given stays."""
        for one in judge_times(self._turns(waiting), self.config.rule, self._noise()):
            self.found.judged[one.case_key] = one

    def _turns(self, cases: Sequence[PairedCase]) -> list[CaseTurns]:
        return [self.found.turns[case.key] for case in cases if case.key not in self.found.ended]

    def _noise(self) -> dict[str, Noise]:
        self.found.noise = noise_of(list(self.found.turns.values()), self.config.rule, self.config.pairs)
        return self.found.noise

    def _too_noisy(self, waiting: Sequence[PairedCase]) -> bool:
        turns = [case for case in self._turns(waiting) if case.clocks]
        return bool(turns) and self._noise()[turns[0].clocks[0]].too_noisy

    def _withdraw(self, waiting: Sequence[PairedCase]) -> None:
        noise = self._noise()
        judged = judge_times(self._turns(waiting), self.config.rule, noise)
        for one in judged:
            self.found.judged[one.case_key] = withdrawn(one, noise[one.clock])

    def _pair(self, cases: Sequence[PairedCase], number: int) -> None:
        """Measure one process pair of every case; with several devices, each has its share, both sides on it."""
        devices = self.config.devices
        if len(devices) < 2:
            self._share(cases, number, devices[0] if devices else None, None)
            return
        threads = max(case.base.threads for case in cases)
        cores = ring_cores(len(devices) * threads)
        shares = [(device, [c for c in cases if _shard(c, len(devices)) == i]) for i, device in enumerate(devices)]
        errors: list[BaseException] = []
        workers = [
            threading.Thread(
                target=self._caught, args=(errors, share, number, device, _own_cores(cores, i, threads)), daemon=True
            )
            for i, (device, share) in enumerate(shares)
            if share
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        if errors:
            raise errors[0]

    def _caught(
        self, errors: list[BaseException], cases: Sequence[PairedCase], number: int, device: str, cores: list[int]
    ) -> None:
        try:
            self._share(cases, number, device, cores)
        except BaseException as error:  # told by the thread that waits for this one
            errors.append(error)

    def _share(self, cases: Sequence[PairedCase], number: int, device: str | None, cores: list[int] | None) -> None:
        seed = int(make_key([self.config.seed, number, device])[:8], 16)
        shared = {**self.environment, **({} if device is None else {"CUDA_VISIBLE_DEVICES": device})}
        name = f"pair {number + 1}" + ("" if device is None else f" on device {device}")
        pair = ProcessPair(
            self.sides, self.plugins, self.config, seed, shared, cores, lambda what: self.tell(f"{name}: {what}")
        )
        members = pair.measure(cases)
        with self._lock:
            self.found.versions = pair.versions or self.found.versions
            for member in members:
                self._keep(member)

    def _keep(self, member: PairedMember) -> None:
        key = member.paired.key
        self.found.members.setdefault(key, []).append(member)
        if member.outcome is not None:
            self.found.ended[key] = member.outcome
            self.found.judged.pop(key, None)
        else:
            self.found.turns[key].pairs.append(member.minima())


def _own_cores(cores: Sequence[int], index: int, threads: int) -> list[int]:
    """Return the cores of share ``index``: its own ones, or all where there are too few for that."""
    own = list(cores[index * threads : (index + 1) * threads])
    return own if len(own) == threads else list(cores)


def _shard(case: PairedCase, count: int) -> int:
    """Return the device of a case: always the same, so that all of its process pairs are of one device."""
    return int(case.key[:8], 16) % count
