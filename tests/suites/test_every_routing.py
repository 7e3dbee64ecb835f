"""Every registered routing in a real layer: ``reference`` and ``grouped`` get its Routing, and the oracle passes."""

from __future__ import annotations

import functools

import pytest

from moebench.bench.config import load
from moebench.bench.plan import make_plan
from moebench.contracts import Registry
from moebench.suites.layer import LayerTrial

REGISTRY = Registry.load()
ROUTINGS = REGISTRY.names("routing")
BACKENDS = ("reference", "grouped")
BOUNDARIES = ("topk", "logits")
SIZES = ("model=tiny", "model.experts=16", "axes.tokens=32", "axes.residency=warm")
TURNS = 2
"""So many, that both variants of each step's inputs are run."""


@pytest.fixture(autouse=True)
def _cache(cache, monkeypatch):
    monkeypatch.setenv("MOEBENCH_CACHE", str(cache))


@functools.cache
def planned():
    """The case, or why there is none, of each (routing, backend, boundary)."""
    axes = (f"axes.backend=[{','.join(BACKENDS)}]", f"axes.boundary=[{','.join(BOUNDARIES)}]", "axes.routing=all")
    plan = make_plan(load(["suite=throughput", *SIZES, *axes], REGISTRY, 2.0**32, 2.0**20), REGISTRY, 2.0**32)
    found = {key(case): case for case in plan.cases}
    return found | {key(item.case): item.refusal for item in plan.refused}


def key(case):
    return case.routing.name, case.backend.name, case.boundary


def selects(routing):
    """Whether a routing can be handed over as logits."""
    case = planned()[routing, "reference", "topk"]
    return REGISTRY.params("routing", case.routing).selection(REGISTRY.params("model", case.model).shape()) is not None


def trial_of(routing, backend, boundary="topk"):
    case = planned()[routing, backend, boundary]
    assert not isinstance(case, str), f"routing '{routing}' is refused on backend '{backend}': {case}"
    return LayerTrial(case, REGISTRY)


def all_ok(trial):
    for _ in range(TURNS):
        trial.begin_turn()
        for step in range(trial.steps):
            check = trial.verify(step, trial.run(step))
            assert check.ok, check.reason
    return True


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_a_layer_with_the_routing_passes_its_oracle(routing, backend):
    trial = trial_of(routing, backend)
    assert all_ok(trial)
    entries = min(len(batch.routing.token_N) for batch in trial.batches)
    assert entries > 0, "a Routing without entries would pass any backend"


@pytest.mark.parametrize("routing", ROUTINGS)
def test_logits_are_handed_over_where_the_routing_has_a_selection_and_refused_elsewhere(routing):
    if selects(routing):
        assert all_ok(trial_of(routing, "grouped", "logits"))
    else:
        assert "cannot be handed over as logits" in planned()[routing, "grouped", "logits"]


def test_a_layer_of_another_routing_does_not_pass():
    trial, other = trial_of("topk", "grouped"), trial_of("switch", "grouped")
    trial.begin_turn()
    other.begin_turn()
    assert other.verify(0, other.run(0)).ok
    assert not trial.verify(0, other.run(0)).ok
