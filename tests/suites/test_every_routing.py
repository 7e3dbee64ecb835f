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


def structure_of(routing):
    """The structure that makes the experts of a routing, ``none`` for those of any layer."""
    return getattr(REGISTRY.get("routing", routing).params, "structure", "none")


REFUSED = {(name, "grouped") for name in ROUTINGS if structure_of(name) != "none"}
"""Rank-1 experts and attentions run on backends that know them, and ``grouped`` does not."""


@functools.cache
def planned():
    """The case, or why there is none, of each (routing, backend, boundary)."""
    axes = (f"axes.backend=[{','.join(BACKENDS)}]", f"axes.boundary=[{','.join(BOUNDARIES)}]")
    found = {}
    for structure in sorted({structure_of(name) for name in ROUTINGS}):
        names = ",".join(name for name in ROUTINGS if structure_of(name) == structure)
        settings = ["suite=throughput", *SIZES, *axes, f"axes.structure={structure}", f"axes.routing=[{names}]"]
        plan = make_plan(load(settings, REGISTRY, 2.0**32, 2.0**20), REGISTRY, 2.0**32)
        found |= {key(case): case for case in plan.cases}
        found |= {key(item.case): item.refusal for item in plan.refused}
    return found


def key(case):
    return case.routing.name, case.backend.name, case.boundary


def selects(routing):
    """Whether a routing can be handed over as logits."""
    case = planned()[routing, "reference", "topk"]
    shape = REGISTRY.params("structure", case.structure).reshape(REGISTRY.params("model", case.model).shape())
    return REGISTRY.params("routing", case.routing).selection(shape) is not None


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
    if (routing, backend) in REFUSED:
        assert "use the reference backend" in planned()[routing, backend, "topk"]
        return
    trial = trial_of(routing, backend)
    assert all_ok(trial)
    entries = min(len(batch.routing.token_N) for batch in trial.batches)
    assert entries > 0, "a Routing without entries would pass any backend"


@pytest.mark.parametrize("routing", ROUTINGS)
def test_logits_are_handed_over_where_the_routing_has_a_selection_and_refused_elsewhere(routing):
    backend = "reference" if (routing, "grouped") in REFUSED else "grouped"
    if selects(routing):
        assert all_ok(trial_of(routing, backend, "logits"))
    else:
        assert "cannot be handed over as logits" in planned()[routing, backend, "logits"]


def test_a_layer_of_another_routing_does_not_pass():
    trial, other = trial_of("topk", "grouped"), trial_of("switch", "grouped")
    trial.begin_turn()
    other.begin_turn()
    assert other.verify(0, other.run(0)).ok
    assert not trial.verify(0, other.run(0)).ok
