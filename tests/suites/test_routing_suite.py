"""Suite ``routing``: what it plans, that every routing passes every phase, that its oracles can fail, its figures."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moebench.bench.config import load
from moebench.bench.plan import make_plan
from moebench.contracts import MoebenchError, Registry, Selection
from moebench.moe.router import select
from moebench.moe.routing import Routing
from moebench.results.query import run_sql
from moebench.suites.routing import has_parts
from moebench.suites.routing_oracle import compare_logits, compare_routing, compare_sorted, expected_of, selected
from moebench.suites.routing_oracle import sorted_by_hand as by_hand
from moebench.suites.routing_trial import pipeline_in
from moebench.suites.routing_trials import make_trial

REGISTRY = Registry.load()
ROUTINGS = REGISTRY.names("routing")
SIZES = ("model=tiny", "model.experts=16", "axes.tokens=32", "suite.sequence=16")
relaxed = settings(deadline=None, max_examples=60)


@pytest.fixture(autouse=True)
def _cache(cache, monkeypatch):
    monkeypatch.setenv("MOEBENCH_CACHE", str(cache))


def plan(*settings):
    return make_plan(load(["suite=routing", *settings], REGISTRY, 2.0**32, 2.0**20), REGISTRY, 2.0**32)


def only_case(routing, phase, *settings):
    planned = plan(*SIZES, f"axes.routing={routing}", f"suite.phases=[{phase}]", *settings)
    assert not planned.refused, planned.refused[0].refusal
    (case,) = planned.cases
    return case


@functools.cache
def routed_cases():
    """The route case of every routing, planned at once on the model's own experts, or on those that it names."""
    planned = plan(*SIZES, "axes.routing=all", "suite.phases=[route]")
    cases = {case.routing.name: case for case in planned.cases}
    for item in planned.refused:
        name = item.case.routing.name
        structure = REGISTRY.get("routing", name).params.structure
        assert f"use axes.structure={structure}" in item.refusal
        again = plan(*SIZES, f"axes.routing={name}", f"axes.structure={structure}", "suite.phases=[route]")
        assert not again.refused, again.refused[0].refusal
        (cases[name],) = again.cases
    return cases


def trial_of(routing, phase, *settings):
    """The trial of one phase, whether or not the parameters declare that the router has it."""
    if settings:
        return make_trial(only_case(routing, phase, *settings), REGISTRY)
    case = routed_cases()[routing]
    workload = case.workload if phase == "route" else {"phase": phase, "sequence": case.workload["sequence"]}
    return make_trial(dataclasses.replace(case, workload=workload), REGISTRY)


def all_ok(trial, turns=2):
    for _ in range(turns):
        trial.begin_turn()
        for step in range(trial.steps):
            check = trial.verify(step, trial.run(step))
            assert check.ok, check.reason
    return True


# --- the plan --------------------------------------------------------------------------------------------------------


def test_each_phase_is_a_group_and_no_backend_multiplies_the_cases():
    planned = plan("model=tiny", "axes.routing=[topk,switch]", "axes.backend=[eager,grouped]")
    assert len(planned.groups) == 4
    assert [case.workload["phase"] for case in planned.cases] == [
        phase for phase in ("route", "gate", "select", "permute") for _ in range(2)
    ]


def test_forced_traffic_leaves_no_router_to_run():
    planned = plan("model=tiny", "axes.traffic=zipf")
    assert not planned.cases
    assert "forces the routing" in planned.refused[0].refusal


def test_a_router_without_parts_has_two_phases(monkeypatch):
    params = REGISTRY.get("routing", "topk").params
    monkeypatch.setattr(params, "pipeline", False, raising=False)
    planned = plan("model=tiny")
    assert [case.workload["phase"] for case in planned.cases] == ["route", "permute"]
    assert {"phases route and permute" in item.refusal for item in planned.refused} == {True}


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("suite.phases=[gates]", "did you mean 'gate'"),
        ("suite.phases=[]", "phases is empty"),
        ("suite.noise=-1", "noise must not be negative"),
        ("suite.other=topkk", "did you mean 'topk'"),
    ],
)
def test_mistakes_are_told_in_a_sentence(setting, sentence):
    with pytest.raises(MoebenchError, match=sentence):
        plan("model=tiny", setting)


# --- every routing ---------------------------------------------------------------------------------------------------


WITHOUT_PARTS = {
    "dselect_k": "its gates choose by binary codes: scores and choice are one product",
    "comet": "its trees choose on the way from root to leaf, so nothing scores all experts first",
    "hash": "a table says the expert",
    "thor": "chance says the expert",
    "peer": "a search scores keys, and no expert but those that it finds",
    "ultramem": "a search scores keys, and no expert but those that it finds",
}
"""The routings whose router is no Pipeline, and why: they have phases route and permute."""


@pytest.mark.parametrize("routing", ROUTINGS)
def test_every_router_with_a_scorer_passes_the_phases_of_its_parts(routing):
    case = routed_cases()[routing]
    shape = REGISTRY.params("structure", case.structure).reshape(REGISTRY.params("model", case.model).shape())
    declared = has_parts(case, shape, REGISTRY)
    assert declared == (routing not in WITHOUT_PARTS), "a routing without phases gate and select is told with a reason"
    try:
        pipeline_in(trial_of(routing, "permute").router, case)
    except MoebenchError:
        assert not declared, f"set pipeline = False in the parameters of '{routing}'"
        return
    assert declared, f"set pipeline = True in the parameters of '{routing}'"
    assert all_ok(trial_of(routing, "gate"))
    assert all_ok(trial_of(routing, "select"))


def test_the_scorer_of_moepp_adds_what_the_layer_before_scored():
    trial = trial_of("moepp", "gate")
    trial.begin_turn()
    first_TE = trial.run(0)
    trial.contexts[0] = dataclasses.replace(trial.contexts[0], prev=None)
    assert trial.verify(0, first_TE).ok
    assert not trial.verify(0, trial.run(0)).ok


@pytest.mark.parametrize("routing", ROUTINGS)
def test_every_routing_has_its_figures_and_they_are_the_same_again(routing):
    trial = trial_of(routing, "route")
    assert all_ok(trial)
    facts = trial.facts()
    values = {metric.name: metric.value for metric in facts.metrics}
    assert len(values) == len(facts.metrics), "a name came twice"
    assert values.keys() >= FIGURES
    assert facts == trial_of(routing, "route").facts()


@pytest.mark.parametrize("routing", ROUTINGS)
def test_every_routing_can_be_permuted(routing):
    assert all_ok(trial_of(routing, "permute"))


FIGURES = {
    "load_max_over_mean",
    "load_cv",
    "load_gini",
    "load_entropy",
    "k_mean",
    "k_var",
    "weight_sum_mean",
    "weight_sum_std",
    "weight_negative_share",
    "tls",
    "cls_8",
    "drop_rate",
    "unserved_share",
    "expert_flops_per_token",
    "router_flops_per_token",
    "router_parameters",
    "gradient_share",
    "noise_fluctuation_top1",
    "noise_jaccard_mean",
    "information_modality",
    "information_task",
    "causal",
    "model_scope",
}


# --- oracles that fail -----------------------------------------------------------------------------------------------


def test_a_remembered_answer_is_wrong():
    for phase in ("route", "gate", "select", "permute"):
        trial = trial_of("topk", phase)
        trial.begin_turn()
        remembered = trial.run(0)
        assert trial.verify(0, remembered).ok
        assert not trial.verify(1, remembered).ok
        trial.begin_turn()
        assert not trial.verify(0, remembered).ok


def test_a_wrong_routing_is_seen():
    right = Routing.topk(torch.tensor([[0, 1], [2, 0]]), torch.tensor([[0.75, 0.25], [0.5, 0.5]]), 3)
    assert compare_routing(right, expected_of(right), 2, 2e-5).ok
    for changes, sentence in (
        ({"expert_N": torch.tensor([0, 2, 2, 0])}, "other experts"),
        ({"expert_N": torch.tensor([0, 0, 2, 0])}, "twice"),
        ({"expert_N": torch.tensor([0, 3, 2, 0])}, "out of range"),
        ({"expert_N": torch.tensor([0, 1, 2, 0], dtype=torch.int32)}, "int64"),
        ({"weight_N": right.weight_N * 1.001}, "off by"),
        ({"weight_N": right.weight_N / 0}, "not finite"),
        ({"shape": (3, 3)}, "shape"),
    ):
        check = compare_routing(dataclasses.replace(right, **changes), expected_of(right), 2, 2e-5)
        assert not check.ok
        assert sentence in check.reason
    assert "1 tokens" in compare_routing(right.keep(torch.arange(4) < 3), expected_of(right), 2, 2e-5).reason
    assert "promises 1" in compare_routing(right, expected_of(right), 1, 2e-5).reason


def test_only_a_near_tie_may_fall_the_other_way():
    logits_TE = torch.tensor([[1.0, 1.0 - 1e-7, 0.0], [1.0, 0.5, 0.0]])
    expected = selected(logits_TE, Selection("softmax", 1, True), None)
    ones = torch.ones(2, 1)
    check = compare_routing(Routing.topk(torch.tensor([[1], [0]]), ones, 3), expected, 1, 2e-5)
    assert check.ok
    assert check.flips == 1
    assert not compare_routing(Routing.topk(torch.tensor([[0], [1]]), ones, 3), expected, 1, 2e-5).ok
    assert not compare_routing(
        Routing.topk(torch.tensor([[1], [0]]), ones, 3),
        expected_of(Routing.topk(torch.tensor([[0], [0]]), ones, 3)),
        1,
        2e-5,
    ).ok


def test_wrong_logits_and_a_wrong_order_are_seen():
    logits_TE = torch.tensor([[1.0, -torch.inf, 2.0]])
    assert compare_logits(logits_TE, logits_TE.double(), 2e-5).ok
    assert not compare_logits(logits_TE + 1e-3, logits_TE.double(), 2e-5).ok
    assert not compare_logits(torch.tensor([[1.0, -9.0, 2.0]]), logits_TE.double(), 2e-5).ok
    assert not compare_logits(logits_TE[:, :2], logits_TE.double(), 2e-5).ok
    routing = Routing.topk(torch.tensor([[2, 0], [0, 1]]), torch.tensor([[0.75, 0.25], [0.5, 0.5]]), 3)
    assert compare_sorted(routing.sorted(), by_hand(routing)).ok
    token_N, offsets_E1, weight_N = routing.sorted()
    for wrong in (
        (token_N.roll(1), offsets_E1, weight_N),
        (token_N, offsets_E1.long(), weight_N),
        (token_N, offsets_E1, weight_N.flip(0)),
    ):
        assert not compare_sorted(wrong, by_hand(routing)).ok


@relaxed
@given(
    st.sampled_from(["softmax", "sigmoid", "one"]),
    st.integers(1, 4),
    st.booleans(),
    st.booleans(),
    st.sampled_from([None, (2, 1), (4, 2), (8, 8)]),
    st.integers(0, 2**31),
)
def test_the_oracle_and_the_router_agree_on_every_selection(score, k, renormalize, bias, groups, seed):
    rng = torch.Generator().manual_seed(seed)
    logits_TE, bias_E = torch.randn(12, 8, generator=rng), torch.randn(8, generator=rng) / 4 if bias else None
    selection = Selection(score, k, renormalize, 2.5, bias, groups)
    indices_TK, weights_TK = select(logits_TE, selection, bias_E)
    found = Routing.topk(indices_TK, weights_TK, 8)
    check = compare_routing(found, selected(logits_TE, selection, bias_E), k, 2e-5)
    assert check.ok, check.reason


# --- figures ---------------------------------------------------------------------------------------------------------


def figures(routing, *settings):
    return {metric.name: metric.value for metric in trial_of(routing, "route", *settings).facts().metrics}


def test_a_linear_router_costs_what_its_weights_say():
    trial = trial_of("topk", "route")
    values, cost = {m.name: m.value for m in trial.facts().metrics}, trial.cost(0)
    assert values["router_flops_per_token"] == 2 * 64 * 16
    assert values["router_parameters"] == 64 * 16
    assert values["expert_flops_per_token"] == 2 * 6 * 64 * 32
    assert values["expert_flops_share"] == 2 / 16
    assert cost.flops == 32 * 2 * 64 * 16
    assert cost.bytes == 4 * 64 * 16 + 4 * 32 * 64 + 20 * 64
    assert cost.assignments == 64


def test_parts_of_a_router_cost_what_they_touch():
    gate, choose, sort = (trial_of("topk", phase).cost(0) for phase in ("gate", "select", "permute"))
    assert (gate.flops, choose.flops, sort.flops) == (32 * 2 * 64 * 16, 0, 0)
    assert gate.bytes == 4 * 64 * 16 + 4 * 32 * 64 + 4 * 32 * 16
    assert choose.bytes == 4 * 32 * 16 + 20 * 64
    assert sort.bytes == 2 * 20 * 64


def test_no_noise_and_the_same_routing_change_nothing():
    values = figures("topk", "suite.noise=0")
    assert values["noise_fluctuation_top1"] == values["other_fluctuation_set"] == 0
    assert values["noise_jaccard_mean"] == values["other_jaccard_mean"] == 1
    assert figures("topk")["noise_fluctuation_set"] > 0


def test_gradients_reach_the_routers_that_they_can_reach():
    assert figures("switch")["gradient_share"] == 1
    assert figures("mixtral", "params.routing.mixtral.k=1")["gradient_share"] == 0
    assert 0 < figures("moepp", "params.routing.moepp.zero=8")["gradient_share"] < 1


def test_the_layer_before_tells_something_of_the_next():
    values = figures("topk", "axes.tokens=512")
    assert values["prefetch_transition"] > 0
    assert values["prefetch_popular"] > 0
    assert "prefetch_transition" not in figures("topk", "model.layers=[3]")


def test_what_another_layer_draws_is_not_known_before():
    assert figures("thor", "axes.tokens=512")["prefetch_transition"] < 0.3
    same_table = ("axes.tokens=512", "params.routing.hash.table=balanced")
    assert figures("hash", *same_table)["prefetch_transition"] > 0.9


def test_every_chunk_reads_its_experts_once():
    values = figures("topk")
    assert values["chunk_bytes_8"] == pytest.approx((1 - values["cls_8"]) * 16 * 3 * 64 * 32 * 4)


def test_experts_without_weights_are_in_no_chunk():
    values = figures("moepp")
    assert values["tls"] == pytest.approx(1 - values["ffn_k_mean"] / 16)
    assert values["chunk_bytes_2"] == pytest.approx((1 - values["cls_2"]) * 16 * 3 * 64 * 32 * 4)


# --- a real run ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("routing")
    fast = ("engine.seconds=0.02", "engine.warmup_seconds=0.02", "axes.routing=[topk,switch,moepp]")
    command = [sys.executable, "-m", "moebench.bench", "run", "suite=routing", *SIZES, *fast]
    env = {**os.environ, "MOEBENCH_STORE": str(folder / "store"), "MOEBENCH_CACHE": str(folder / "cache")}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "store", done.stdout


def rows(store, sql):
    return [tuple(row.values()) for row in json.loads(run_sql(store, sql, format="json"))]


def test_a_run_times_every_phase_and_keeps_every_figure(store):
    phase = "params->'workload'->>'phase'"
    timed = rows(store[0], f"SELECT routing, {phase}, status, wall_n > 0 FROM latest WHERE status <> 'skipped'")
    assert {row[2:] for row in timed} == {("ok", True)}
    assert {("switch", part) for part in ("route", "gate", "select", "permute")} <= {row[:2] for row in timed}
    names = {name for (name,) in rows(store[0], "SELECT DISTINCT name FROM metrics")}
    assert FIGURES | {"chunk_bytes_8", "prefetch_transition", "other_jaccard_mean"} <= names
    series = {name for (name,) in rows(store[0], "SELECT DISTINCT name FROM series")}
    assert {"tokens_per_k", "tokens_per_expert", "drop_rate_by_position"} <= series


def test_a_run_renders(store):
    assert "switch" in store[1]
    command = [sys.executable, "-m", "moebench.bench", "report"]
    env = {**os.environ, "MOEBENCH_STORE": str(store[0])}
    done = subprocess.run(command, cwd=store[0].parent, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
