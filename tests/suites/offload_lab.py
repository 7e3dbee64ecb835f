"""Trials of suite ``offload`` on tiny models, run as a worker runs them."""

from __future__ import annotations

from moebench.bench.config import load
from moebench.bench.plan import make_plan
from moebench.bench.worker import _Held
from moebench.contracts import Registry

REGISTRY = Registry.load()
SUITE = REGISTRY.get("suite", "offload").create()
SMALL = ("suite=offload", "model=tiny", "suite.steps=6", "suite.prompt=3", "suite.predicted=false")


def cases(*settings):
    """Return the cases of one plan, none of which is refused."""
    planned = make_plan(load([*SMALL, *settings], REGISTRY, 2.0**32, 2.0**20), REGISTRY, 2.0**32)
    assert not planned.refused, planned.refused[0].refusal
    return planned.cases


def offloaded(**params):
    """Return the setting of each parameter of backend ``offload``, and that no other backend runs."""
    return ["axes.backend=offload", *(f"params.backend.offload.{name}={value}" for name, value in params.items())]


class Run:
    """A trial held as a worker holds it; ``turns`` are taken and verified."""

    def __init__(self, case, turns=1):
        self.trial = SUITE.prepare(case, REGISTRY)
        self.held = _Held(self.trial, case)
        self.checks = []
        for _ in range(turns):
            self.reply = self.held.turn(0, self.trial.steps)
            self.checks.append(self.held.verify())

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.trial.close()

    @property
    def events(self):
        """What the store did in the last turn."""
        return [list(events) for events in self.trial.session.store.log]

    def metrics(self):
        """Return every metric by its name; no name is there twice."""
        found = self.trial.facts().metrics
        assert len({one.name for one in found}) == len(found)
        return {one.name: one for one in found}

    def values(self):
        return {name: one.value for name, one in self.metrics().items()}


def run_of(*settings, turns=1):
    """Return a run of the only case of these settings."""
    (case,) = cases(*settings)
    return Run(case, turns)
