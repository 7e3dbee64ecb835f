"""The trials of suite ``offload``: whoever decides what stays, the bits of eager; figures by hand or by bound."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from moebench.backends.offload.errors import OffloadError
from moebench.backends.offload.names import POLICIES, PREFETCHERS, make_policy, make_prefetcher
from moebench.backends.offload.simulate import simulate
from moebench.contracts import load_file
from moebench.moe.experts import ExpertStore
from moebench.moe.oracle import reference
from moebench.moe.routing import Routing
from moebench.suites.offload import energy
from moebench.suites.offload.check import layer_by_layer, same
from moebench.suites.offload.figures import Turn, turn_figures
from moebench.suites.offload.layers import Answer

lab = load_file(Path(__file__).parent / "offload_lab.py")

EVERY_POLICY = [f"'{name}:blk.[01]'" if name == "pattern" else name for name in POLICIES]
LAYERS, EXPERTS, K, STEPS = 4, 8, 2, 6


@pytest.fixture(autouse=True, scope="module")
def _cache(cache):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOEBENCH_CACHE", str(cache))
        yield


@pytest.fixture(scope="module")
def product(_cache):
    """Every policy with every prefetcher, planned at once."""
    names = lab.offloaded(policy=f"[{','.join(EVERY_POLICY)}]", prefetch=f"[{','.join(PREFETCHERS)}]")
    found = {(case.backend.params["policy"], case.backend.params["prefetch"]): case for case in lab.cases(*names)}
    assert len(found) == len(POLICIES) * len(PREFETCHERS)
    return found


@pytest.fixture(scope="module")
def lru(product):
    """A run of two turns with least recently used and nothing brought ahead."""
    with lab.Run(product["lru", "none"], turns=2) as run:
        yield run


# --- the oracle ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_and_prefetcher_gives_the_bits_of_eager_and_the_events_of_the_simulator(policy, product):
    for (name, prefetch), case in product.items():
        if name.partition(":")[0] != policy:
            continue
        with lab.Run(case) as run:
            (check,), recording = run.checks, run.trial.recording
            assert (check.ok, check.error, check.bound) == (True, 0.0, 0.0), (prefetch, check.reason)
            alone = simulate(
                recording.accesses,
                make_policy(name, recording.popularity),
                LAYERS * EXPERTS // 4,
                recording.layout,
                make_prefetcher(prefetch),
            )
            assert run.events == [list(events) for events in alone.events]


def test_a_store_that_does_other_than_its_simulation_is_wrong(product):
    with lab.Run(product["lru", "gate"]) as run:
        log = run.trial.session.store.log
        log[-1][-1] = dataclasses.replace(log[-1][-1], kept=not log[-1][-1].kept)
        check = run.held.verify()
        assert not check.ok
        assert check.reason == f"at step {STEPS}, layer {LAYERS - 1} the store did other than its simulation"


def test_outputs_one_bit_off_are_wrong(product):
    with lab.Run(product["lru", "none"]) as run:
        output_BH = run.held.outputs[2]
        output_BH[0, 0] = torch.nextafter(output_BH[0, 0], torch.tensor(math.inf))
        check = run.held.verify()
        assert not check.ok
        assert "must be the same bits" in check.reason


def test_bounds_can_fail():
    x_BH = torch.ones(2, 8)
    assert same(x_BH, x_BH.clone()).ok
    assert not same(x_BH * torch.tensor([[1.0], [1.001]]), x_BH).ok  # one sequence is enough
    assert not same(torch.full((2, 8), math.nan), x_BH).ok
    assert not same(x_BH[:1], x_BH).ok


def test_each_layer_is_held_to_the_oracle_on_what_it_read():
    store = ExpertStore(torch.randn(2, 8, 4), torch.randn(2, 4, 4), ("ffn", "ffn"))
    routing = Routing.topk(torch.tensor([[0], [1], [1]]), torch.ones(3, 1), 2)
    x_TH = torch.randn(3, 4)
    y_TH = reference(store, routing, x_TH).y_TH.float()
    right = Answer(0, x_TH, routing, y_TH)
    assert layer_by_layer([right, right], {0: store}).ok
    for wrong in (y_TH * 1.01, y_TH.flip(0), torch.full_like(y_TH, math.nan)):
        assert not layer_by_layer([right, right._replace(y_TH=wrong)], {0: store}).ok


def test_a_weight_that_changed_in_the_file_is_named_and_gives_no_number(product, tmp_path, monkeypatch):
    monkeypatch.setenv("MOEBENCH_CACHE", str(tmp_path))
    prepared = "moebench.suites.offload.prepared._PREPARED"
    monkeypatch.setattr(prepared, {})
    with lab.Run(product["lru", "none"]) as run:
        path, size = run.trial.file.path, run.trial.file.slab_bytes()
        spoilt = bytearray(path.read_bytes())
        for place in range(len(spoilt) - size * LAYERS * EXPERTS + 64, len(spoilt), size):
            spoilt[place] ^= 1
        path.write_bytes(spoilt)
        with pytest.raises(OffloadError, match="changed after it was opened"):
            run.held.turn(0, STEPS)
        assert not run.held.verify().ok
    monkeypatch.setattr(prepared, {})
    with pytest.raises(OffloadError, match=r"expert \d+ of layer \d+.*checksum"):
        lab.Run(product["lru", "none"])


# --- figures ---------------------------------------------------------------------------------------------------------


def test_figures_of_the_cache_are_those_of_its_events(lru):
    recording, values = lru.trial.recording, lru.values()
    decoded = [event for events in lru.events[recording.prompt_accesses :] for event in events]
    assert recording.prompt_accesses == LAYERS
    assert len(decoded) == values["experts_per_step"] * STEPS == LAYERS * K * STEPS
    hits = sum(event.kind == "hit" for event in decoded)
    assert values["hit_rate"] == values["lru_hit_rate"] == hits / len(decoded)
    assert 0 < values["hit_rate"] < values["belady_hit_rate"] < 1
    assert values["optimality"] == 0.0
    assert values["misses_per_step"] * STEPS == len(decoded) - hits
    assert values["capacity_experts"] == LAYERS * EXPERTS // 4
    slab = lru.trial.file.slab_bytes()
    assert values["resident_bytes"] == (values["capacity_experts"] + 2) * slab
    assert values["bytes_per_step"] == values["misses_per_step"] * slab
    assert values["evictions_per_step"] == values["misses_per_step"]  # the prompt filled the cache
    assert (values["prefetched_per_step"], values["late_per_step"]) == (0, 0)
    assert values["prefetch_precision"] is values["prefetch_recall"] is None
    assert "by_token_misses_per_step" not in values  # there is one token a step


def test_belady_closes_the_gap_and_is_the_bound(product):
    with lab.Run(product["belady", "none"]) as run:
        values = run.values()
    assert values["hit_rate"] == values["belady_hit_rate"]
    assert values["optimality"] == 1.0


def test_means_are_those_of_turns_that_were_sampled(lru):
    """The first turn is taken for its check, and facts may be asked for again."""
    assert len(lru.checks) == 2
    values, again = lru.values(), lru.values()
    assert values == again
    assert lru.metrics()["step_time"].n == STEPS
    assert 0 < values["stall_per_step"] < values["step_time"]
    assert values["step_time"] * STEPS == pytest.approx(sum(lru.trial.sampled[0].step_ns))
    assert values["step_time"] * STEPS <= sum(lru.reply["ns"])  # the engine's clock is around ours


def test_means_of_turns_by_hand():
    entry = type("Entry", (), {"stall_ns": 3, "bytes_read": 5, "read_ns": 7, "late": 1})
    values = {one.name: one.value for one in turn_figures([Turn([entry] * 4, [10, 20]), Turn([entry] * 4, [30, 40])])}
    assert values == {
        "stall_per_step": 6,
        "bytes_per_step": 10,
        "read_time_per_step": 14,
        "late_per_step": 2,
        "step_time": 25,
    }
    assert {one.value for one in turn_figures([])} == {None}


def test_an_oracle_brings_everything_but_what_comes_first(product):
    with lab.Run(product["belady", "oracle"]) as run:
        recording, values = run.trial.recording, run.values()
        missed = [event for events in run.events for event in events if event.kind == "miss"]
        assert len(missed) == len(recording.accesses[0].experts)
    assert (values["prefetch_recall"], values["misses_per_step"], values["hit_rate"]) == (1.0, 0.0, 1.0)


def test_pregating_covers_all_but_the_first_layer_of_a_step(product):
    with lab.Run(product["lru", "pregate"]) as run:
        missed = {event.key[0] for events in run.events for event in events if event.kind == "miss"}
    assert missed == {0}


def test_the_gate_foresees_more_than_chance(product):
    with lab.Run(product["lru", "gate"]) as run:
        values = run.values()
    assert values["gate_chance"] == K / EXPERTS
    assert values["gate_recall"] > 1.5 * values["gate_chance"]


def test_an_lru_hits_what_popularity_says():
    """Che's approximation is of requests by popularity alone, which a hotspot that stays makes."""
    with lab.run_of(
        *lab.offloaded(), "axes.traffic=zipf", "params.traffic.zipf.alpha=1.2", "suite.steps=40", "suite.prompt=8"
    ) as run:
        values = run.values()
    assert values["hit_rate"] > 0.2
    assert values["che_hit_rate"] == pytest.approx(values["hit_rate"], abs=0.1)


def test_whole_layers_and_experts_of_equal_bytes(product, lru):
    with lab.Run(product["cpu_moe", "none"]) as run:
        values, other = run.values(), lru.values()
    assert values["resident_bytes"] == other["resident_bytes"]
    assert values["hit_rate"] == 1 / LAYERS  # the last layer is at hand
    assert values["evictions_per_step"] == 0


def test_energy_is_null_where_nobody_may_read_it(product, tmp_path, monkeypatch):
    monkeypatch.setattr(energy, "COUNTER", tmp_path / "energy_uj")
    with lab.Run(product["lru", "none"]) as run:
        assert run.metrics()["energy_per_step"].value is None
    (tmp_path / "energy_uj").write_text("5000000\n")
    assert energy.microjoules() == 5_000_000
    with lab.Run(product["lru", "none"], turns=2) as run:
        assert (run.metrics()["energy_per_step"].value, run.metrics()["energy_per_step"].n) == (0.0, 2)


# --- what is predicted -----------------------------------------------------------------------------------------------


def test_predictions_stand_beside_what_was_measured(lru):
    values = lru.values()
    assert values["prediction_error"] == pytest.approx(
        abs(values["predicted_step_time"] - values["step_time"]) / values["step_time"]
    )
    assert 0 < values["predicted_stall_per_step"] < values["predicted_step_time"]
    assert values["two_tier_step_time"] > 0
    assert values["lens_step_time"] > 0


def test_a_predicting_trial_says_the_same_of_the_cache_and_measures_nothing(lru):
    (_, predicting) = lab.cases(*lab.offloaded(), "suite.predicted=true")
    trial = lab.SUITE.prepare(predicting, lab.REGISTRY)
    assert (trial.steps, trial.verify(0, trial.run(0)).ok) == (1, True)
    found, measured = {one.name: one.value for one in trial.facts().metrics}, lru.values()
    assert not {"step_time", "stall_per_step", "prediction_error", "energy_per_step"} & found.keys()
    for name in ("hit_rate", "misses_per_step", "optimality", "che_hit_rate", "predicted_late_per_step"):
        assert found[name] == measured[name]
    assert trial.facts().executed is None
