"""The trials of suite ``offload``: a step is one token for each sequence. Imported by workers only.

Shape letters: B sequences, H hidden.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor

from ...backends.offload.access import Future
from ...backends.offload.names import needs_costs
from ...backends.offload.opening import Opening, described_by, open_disk
from ...backends.offload.session import OffloadSession
from ...backends.plugins import Offload
from ...contracts import Case, Check, Cost, Facts, Metric, Registry
from ...moe.experts import ExpertStore
from ..digest import sha256_of
from .approximate import Approximation, approximate, changes_result
from .check import layer_by_layer, same
from .cores import roaming
from .energy import microjoules
from .figures import Turn, cache_figures, gate_figures, order_figures, turn_figures
from .host import hosted
from .layers import Answer
from .predicting import hints_read, prediction_of
from .prediction import figures
from .prepared import Prepared, let_go, prepared, slab_file, stores_of


class ResidentTrial:
    """The model with all experts at hand, on any backend: what no offloading can be faster than.

    Routings are those of the recording, since backends that round differently would choose others near a tie.
    """

    state: Literal["stream"] = "stream"
    hinted = False

    def __init__(self, case: Case, registry: Registry) -> None:
        self.case, self.registry = case, registry
        self.found: Prepared = prepared(case, registry)
        self.rounds = self.rounds_otherwise()
        self.answers: dict[int, list[Answer]] = {}
        self._dense: dict[int, ExpertStore] = {}
        self.recording, self.stack = self.found.recording, self.found.stack
        self.expected: Sequence[Tensor] = self.recording.final
        self.replayed = self.recording.routings if self.rounds else None
        self.steps = self.recording.steps
        self.input_sha256 = sha256_of(*self.recording.final)
        self.session = self._open()
        self.step_ns: list[int] = []
        self._joules: list[float] = []
        self._before: int | None = None

    def _open(self) -> Any:
        maker = self.registry.get("backend", self.case.backend.name).create(self.case.backend.params)
        return maker.load(stores_of(self.case, self.registry, self.found), self.found.specs)

    def rounds_otherwise(self) -> bool:
        """Return whether outputs may differ from those of ``eager`` by rounding."""
        return self.case.backend.name != "eager"

    def begin_turn(self) -> None:
        """Begin anew, and take the prompts."""
        self.stack.layers.serve_by(self.session, self.replayed)
        if not self.hinted:
            self.stack.layers.hint = None  # nobody reads hints, and they cost a router's time
        self.stack.begin()
        self.step_ns = []
        self._before = microjoules()

    def run(self, step: int) -> Tensor:
        """Decode one token of each sequence; return what the head reads, [B, H]."""
        if self.rounds:
            self.stack.layers.seen = self.answers[step] = []
        began = time.perf_counter_ns()
        final_BH = self.stack.step(step)
        self.step_ns.append(time.perf_counter_ns() - began)
        return final_BH

    def verify(self, step: int, output: Tensor) -> Check:
        """Compare with the run of backend ``eager`` with all experts at hand; see ``right``."""
        self._measure_energy(step)
        return self.right(step, output)

    def right(self, step: int, output: Tensor) -> Check:
        """Ask for the expected bits; of executions that round otherwise, that each layer is right for what it read."""
        if self.rounds:
            return layer_by_layer(self.answers[step], self._dense_stores())
        return same(output, self.expected[step])

    def _dense_stores(self) -> dict[int, ExpertStore]:
        """Return all experts as their codes say, dense: the tier in RAM has them all, and so may its oracle."""
        if not self._dense:
            for index, store in stores_of(self.case, self.registry, self.found).items():
                gate_up, down = store.dense()
                self._dense[index] = replace(store, gate_up=gate_up, down=down)
        return self._dense

    def _measure_energy(self, step: int) -> None:
        """Note the energy of the turn that has just ended, before its first output is looked at."""
        now = microjoules() if step == 0 else None
        if now is not None and self._before is not None and now >= self._before:
            self._joules.append((now - self._before) / 1e6 / self.steps)

    def cost(self, step: int) -> Cost:
        """Return nothing: how many bytes a step must move depends on what is in the cache."""
        return Cost(0.0, 0.0)

    def metrics(self) -> list[Metric]:
        """Return what is resident, and the energy of a step where the host tells."""
        energy = sum(self._joules) / len(self._joules) if self._joules else None
        resident = Metric("resident_bytes", float(self.session.resident_bytes()), "byte")
        return [resident, Metric("energy_per_step", energy, "joule", n=len(self._joules))]

    def facts(self) -> Facts:
        """Return the metrics and what ran."""
        return Facts(tuple(self.metrics()), executed=self.session.executed())

    def close(self) -> None:
        """Free the backend's session."""
        self.session.close()


class OffloadTrial(ResidentTrial):
    """The model with its experts in the slow tier, of which the cache holds a share; the others are not in memory.

    ``expected`` are the outputs of each step: those of the recording, unless the execution changes the result. Where it
    does, or computes an expert in another order (where it lies), Routings are those of the recording.
    """

    def __init__(self, case: Case, registry: Registry) -> None:
        self.params: Offload = registry.params("backend", case.backend)
        found = prepared(case, registry)
        self.file = slab_file(case, registry, found, self.params.low)
        self.future, self.popularity = Future(found.recording.accesses), found.recording.popularity
        described = described_by(self.file, found.specs)
        self.opening = Opening(
            found.recording.layout, described, found.specs, self.params, self.future, popularity=self.popularity
        )
        self.prediction = prediction_of(case, registry, found, self.file, self.params)
        self.hinted, changed = hints_read(self.params), changes_result(self.params)
        self.approximation: Approximation | None = None
        if changed:
            stores = stores_of(case, registry, found)
            self.approximation = approximate(found.stack, found.recording, found.specs, stores, self.params)
        let_go(found)
        self.turns: list[Turn] = []
        super().__init__(case, registry)
        if self.approximation is not None:
            self.expected, self.replayed = self.approximation.expected, self.recording.routings

    def _open(self) -> OffloadSession:
        with roaming():
            if self.params.tier == "host":
                return hosted(self.found, self.file, self.params).session(self.params, self.future, self.popularity)
            return open_disk(self.file, self.opening)

    def rounds_otherwise(self) -> bool:
        """Return whether outputs may differ from those of ``eager`` by rounding: products on codes do."""
        return needs_costs(self.params.execution)

    def begin_turn(self) -> None:
        """Begin with a cache as the policy has it at the start, and take the prompts."""
        self._keep_turn()
        self.session.close()
        self.session = self._open()
        super().begin_turn()

    def _keep_turn(self) -> None:
        """Note what the turn that has ended cost, once, if it was a whole one."""
        prompt, store = self.recording.prompt_accesses, self.session.store
        if len(self.step_ns) == self.steps and len(store.log) == len(self.recording.accesses):
            self.turns.append(Turn(store.ledger[prompt:], self.step_ns))
            self.step_ns = []

    @property
    def sampled(self) -> list[Turn]:
        """The turns but the first, which is taken for its check alone; that one where there is no other."""
        return self.turns[1:] or self.turns

    def verify(self, step: int, output: Tensor) -> Check:
        """Compare with the run with all experts at hand, bit for bit unless experts are computed in another order, and
        the cache's events with the simulator's."""
        self._measure_energy(step)
        if step == self.steps - 1:
            check = self._events()
            if not check.ok:
                return check
        return self.right(step, output)

    def _events(self) -> Check:
        simulated = self.prediction.simulated.events
        for place, (found, wanted) in enumerate(zip(self.session.store.log, simulated, strict=True)):
            if list(found) != list(wanted):
                access = self.recording.accesses[place]
                reason = f"at step {access.step}, layer {access.layer} the store did other than its simulation"
                return Check(False, reason=reason)
        return Check(True, 0.0)

    def _batched(self) -> list[Metric]:
        """Return what first come, first served would need, where waiting tokens are batched by their experts."""
        waiting = getattr(self.stack, "waiting", None)
        if waiting is None:
            return []
        return [Metric("first_come_experts_per_step", waiting.first_come_experts(), "1", n=self.steps)]

    def _switches(self) -> list[Metric]:
        """Return the time of steps at which other experts become popular, and of the others, where the traffic says."""
        period = getattr(self.registry.params("traffic", self.case.traffic), "period", None)
        if period is None or not self.sampled:
            return []
        times: dict[bool, list[int]] = {True: [], False: []}
        for turn in self.sampled:
            for step, ns in enumerate(turn.step_ns):
                times[(step + 1) % period == 0].append(ns)
        names = {True: "switch_step_time", False: "steady_step_time"}
        return [Metric(names[at], sum(ns) / len(ns) if ns else None, "ns", n=len(ns)) for at, ns in times.items()]

    def metrics(self) -> list[Metric]:
        """Return what the cache did, what it cost, what was predicted of it, and how far off the results are."""
        self._keep_turn()
        return [
            *super().metrics(),
            *cache_figures(self.recording, self.prediction.simulated),
            *gate_figures(self.recording),
            *order_figures(self.recording, self.stack.layers, self.params.policy, self.prediction.simulated.capacity),
            *self._batched(),
            *turn_figures(self.sampled),
            *self._switches(),
            *figures(self.prediction, self.sampled),
            *(() if self.approximation is None else self.approximation.metrics),
        ]
