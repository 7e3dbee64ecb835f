"""Replay from end to end: what a router did, written down, forced onto every backend, checked, told with the row."""

from __future__ import annotations

import pytest
import torch

from moebench.bench.config import load
from moebench.bench.plan import make_plan
from moebench.bench.rows import measured_rows
from moebench.bench.sampling import Member
from moebench.contracts import Registry, Selection, plain
from moebench.moe.layer import LayerWeights
from moebench.moe.routing import Context
from moebench.moe.shapes import ModelShape
from moebench.suites.layer import STEPS, VARIANTS, LayerTrial
from moebench.suites.layer_training import TrainingTrial
from moebench.suites.trace import TraceError, columns_of, load_trace, save_trace

REGISTRY = Registry.load()
TOKENS, EXPERTS, HIDDEN, LAYERS = 12, 8, 64, (0, 1)
ROUTINGS = {"adamoe": {"k": 2}, "top_p": {}, "expert_choice": {}, "adamoe_vla": {"k": 2}, "blockffn": {}}
"""Null experts, as many as it takes, idle tokens, negative weights, weights that sum to more than one."""


def decisions(name):
    """(step, layer, Routing) of a registered router on random inputs, experts without weights left out."""
    weights = LayerWeights(
        torch.empty(EXPERTS, 2, HIDDEN), torch.empty(EXPERTS, HIDDEN, 1), seeded(EXPERTS, HIDDEN) / 8
    )
    shape = ModelShape(HIDDEN, 1, EXPERTS, 2, LAYERS, Selection("softmax", 2, False))
    bundle = REGISTRY.get("routing", name).create(ROUTINGS[name])(weights, shape, 0)
    for step in range(STEPS * VARIANTS):
        for layer in LAYERS:
            routing = bundle.router(seeded(TOKENS, HIDDEN, seed=10 * step + layer), Context(layer=layer))
            ffn_N = torch.tensor([bundle.kinds[expert] == "ffn" for expert in routing.expert_N.tolist()])
            yield step, layer, routing.keep(ffn_N).relabel(torch.arange(len(bundle.kinds)), EXPERTS)


def seeded(*size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def recorded(tmp_path):
    """A function that records a routing and returns (its decisions, the settings that replay them)."""

    def make(name="adamoe", fit="exact"):
        places = list(decisions(name))
        path = str(tmp_path / f"{name}.parquet")
        sha256 = save_trace(path, columns_of(places))
        k = int(max(routing.k_T.max() for _, _, routing in places))
        replay = {"path": path, "sha256": sha256, "fit": fit}
        settings = ["axes.traffic=replay", *(f"params.traffic.replay.{key}={value}" for key, value in replay.items())]
        return places, [*settings, f"params.routing.topk.k={k}"]

    return make


SMALL = ("model=tiny", f"model.hidden={HIDDEN}", "model.width=32", f"model.experts={EXPERTS}", f"axes.tokens={TOKENS}")
BACKENDS = ("reference", "eager", "batched", "grouped")


def planned(*settings, suite="throughput"):
    fixed = (f"suite={suite}", *SMALL, "axes.residency=warm", "model.layers=[0]")
    return make_plan(load([*fixed, *settings], REGISTRY, 2.0**32, 2.0**20), REGISTRY, 2.0**32)


def only_case(*settings, **kwargs):
    plan = planned(*settings, **kwargs)
    assert not plan.refused, plan.refused[0].refusal
    (case,) = plan.cases
    return case


def all_ok(trial):
    for _ in range(VARIANTS):
        trial.begin_turn()
        for step in range(trial.steps):
            check = trial.verify(step, trial.run(step))
            assert check.ok, check.reason


@pytest.fixture(autouse=True)
def _cache(cache, monkeypatch):
    monkeypatch.setenv("MOEBENCH_CACHE", str(cache))


# --- any routing onto any backend ------------------------------------------------------------------------------------


def assert_replayed(case, places):
    trial = LayerTrial(case, REGISTRY)
    wanted = [routing for _, layer, routing in places if layer == case.layers[0]]
    for batch, routing in zip(trial.batches, wanted, strict=True):
        assert torch.equal(batch.routing.to_dense(), routing.to_dense())
    all_ok(trial)
    trial.close()


@pytest.mark.parametrize("name", ROUTINGS)
def test_any_recorded_routing_runs_on_any_backend(name, recorded):
    places, settings = recorded(name)
    plan = planned(*settings, f"axes.backend=[{','.join(BACKENDS)}]", "axes.boundary=[topk,sorted]")
    assert len(plan.cases) == 2 * len(BACKENDS), plan.refused
    for case in plan.cases:
        assert_replayed(case, places)


def test_packed_weights_take_it_too(recorded):
    if not REGISTRY.get("backend", "packed").create().availability().available:
        pytest.skip("packed is not available here")
    places, settings = recorded()
    case = only_case(*settings, "axes.backend=packed", "axes.quantization=int8", "axes.dtype=bfloat16")
    assert_replayed(case, places)


def test_the_recorded_routings_are_as_irregular_as_they_should_be():
    numbers = {name: torch.cat([routing.k_T for _, _, routing in decisions(name)]) for name in ROUTINGS}
    assert (numbers["adamoe"] == 0).any()
    assert (numbers["expert_choice"] == 0).any()
    assert all(numbers[name].unique().numel() > 2 for name in ROUTINGS if name != "adamoe_vla")
    assert any((routing.weight_N < 0).any() for _, _, routing in decisions("adamoe_vla"))
    assert any((routing.to_dense().sum(1) > 1.1).any() for _, _, routing in decisions("blockffn"))


def test_training_steps_take_a_recorded_routing_too(recorded):
    case = only_case(*recorded()[1], "axes.backend=eager", suite="training")
    all_ok(TrainingTrial(case, REGISTRY))


# --- the layer, and what is told -------------------------------------------------------------------------------------


def test_each_layer_replays_its_own(recorded):
    places, settings = recorded()
    plan = planned(*settings, "axes.backend=eager", "model.layers=[0,1]")
    first, second = (LayerTrial(case, REGISTRY) for case in plan.cases)
    for trial, layer in ((first, 0), (second, 1)):
        own = next(routing for step, where, routing in places if (step, where) == (0, layer))
        assert torch.equal(trial.batches[0].routing.to_dense(), own.to_dense())
        requested = next(series for series in trial.facts().series if series.name == "requested_share")
        assert requested.values == pytest.approx((own.counts_E / own.counts_E.sum()).tolist())
    assert not torch.equal(first.batches[0].routing.to_dense(), second.batches[0].routing.to_dense())


def told(case):
    """What the row of a case says, and the metric beside it."""
    member = Member(case)
    member.facts = plain(LayerTrial(case, REGISTRY).facts())
    member.wall_ns, member.cpu_ns, member.turns, member.cost = [1], [1], [0], {}
    tables = measured_rows("run", [member], (), ["sitting"])
    shares = [metric["value"] for metric in tables["metrics"] if metric["name"] == "replay_exact_share"]
    return tables["cases"][0]["reason"], shares


def test_what_a_replay_did_stands_in_the_row(recorded):
    settings = (*recorded()[1], "params.traffic.replay.fit=[exact,projected,forced]", "axes.tokens=[12,16]")
    plan = planned(*settings, "axes.backend=eager")
    assert {(case.traffic.params["fit"], case.tokens): told(case) for case in plan.cases} == {
        ("exact", 12): ("replay exact", [1.0]),
        ("projected", 12): ("replay exact", [1.0]),
        ("projected", 16): ("replay projected: the trace has 12 tokens where the case has 16", [0.0]),
        ("forced", 12): ("replay forced: tokens draw by the recorded load, with equal weights", [0.0]),
        ("forced", 16): ("replay forced: tokens draw by the recorded load, with equal weights", [0.0]),
    }
    (refused,) = plan.refused
    assert refused.refusal == (
        "traffic 'replay': the trace has steps of 12 tokens where the case has 16; choose the same axes.tokens, or "
        "params.traffic.replay.fit=projected."
    )


def test_other_traffic_has_no_audit():
    assert told(only_case("axes.traffic=zipf", "axes.backend=eager")) == (None, [])


# --- refusals --------------------------------------------------------------------------------------------------------


def test_what_cannot_be_replayed_is_refused_before_the_run(recorded):
    swept = ("axes.routing=[topk,adamoe]", "params.routing.topk.k=[1,2]", "params.traffic.replay.layer=[1,5]")
    plan = planned(*recorded()[1][:-1], "axes.backend=eager", *swept)
    assert len(plan.cases) == 1
    reasons = {item.refusal for item in plan.refused}
    assert len(plan.refused) == 5
    for words in (
        "the trace has 8 experts, 2 per token, where the layer has 8, 1 per token; choose another layer, or",
        "the trace has the layers 0, 1; choose one of them with params.traffic.replay.layer.",
        "forces top-k, which this case leaves to the router",
    ):
        assert any(words in reason for reason in reasons), reasons
    assert all(reason.startswith("traffic 'replay'") for reason in reasons)


def test_a_file_that_was_tampered_with_is_refused_in_a_sentence(recorded, tmp_path):
    settings = recorded()[1]
    file = tmp_path / "adamoe.parquet"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    plan = planned(*settings, "axes.backend=eager")
    assert not plan.cases
    assert "; give the file that was recorded." in plan.refused[0].refusal
    assert plan.refused[0].refusal.count(". ") == 0


def test_columns_are_those_of_the_routing(tmp_path):
    places = list(decisions("top_p"))
    path = str(tmp_path / "trace.jsonl")
    trace = load_trace(path, save_trace(path, columns_of(places)))
    for step, layer, routing in places:
        entries = trace.at(step, layer)
        assert entries.tokens == TOKENS
        assert sorted(zip(entries.token_N.tolist(), entries.expert_N.tolist(), strict=True)) == sorted(
            zip(routing.token_N.tolist(), routing.expert_N.tolist(), strict=True)
        )
    with pytest.raises(TraceError, match="has sha256"):
        load_trace(path, "0" * 64)


def test_a_step_has_the_tokens_that_it_says(tmp_path):
    columns = {"step": [0, 0, 1], "layer": [0, 3, 0], "token": [0, 1, 0], "expert": [1, 1, 1], "weight": [1.0] * 3}
    path = str(tmp_path / "trace.parquet")
    assert load_trace(path, save_trace(path, columns)).at(0, 0).tokens == 2
    trace = load_trace(path, save_trace(path, {**columns, "tokens": [4, 4, 1]}))
    assert [trace.at(step, 0).tokens for step in (0, 1)] == [4, 1]
    with pytest.raises(TraceError, match="has a token beyond its column 'tokens'; count all tokens of a step"):
        load_trace(path, save_trace(path, {**columns, "tokens": [4, 1, 1]}))
