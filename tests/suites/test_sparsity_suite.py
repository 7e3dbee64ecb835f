"""Suite sparsity: what is left out, what it would save, and the quality that suite accuracy has."""

from __future__ import annotations

import pytest

from moebench.bench.run import planned
from moebench.contracts import Metric, Registry
from moebench.moe.sparsifiers import steps
from moebench.suites.quality.sparsified import CHUNKS, SparsityTrial
from moebench.suites.quality.trial import AccuracyTrial, means

TEXT = ("model.layers=all", "suite.tokens=256", "suite.window=64")


@pytest.fixture(autouse=True)
def _cache(cache, monkeypatch):
    monkeypatch.setenv("MOEBENCH_CACHE", str(cache))


def cases_of(*settings):
    return planned(list(settings), Registry.load())[0].cases


def facts_of(trial):
    for step in range(trial.steps):
        check = trial.verify(step, trial.run(step))
        assert check.ok, check.reason
    return trial.facts()


def judged(*settings):
    (case,) = cases_of("suite=sparsity", *settings)
    facts = facts_of(SparsityTrial(case, Registry.load()))
    return {m.name: m for m in facts.metrics}, {s.name: s.values for s in facts.series if s.layer is None}, facts


def test_a_method_meets_speed_and_accuracy_on_method_key():
    chosen = ("model=smollm2", "axes.sparsity=[none,teal,cats]", "params.sparsity.teal.level=[0.25,0.5]")
    keys = {case.method_key for case in cases_of("suite=sparsity", *chosen, "axes.backend=[eager,grouped]")}
    assert len(keys) == 4
    for suite in ("accuracy", "latency"):
        assert {case.method_key for case in cases_of(f"suite={suite}", *chosen, "axes.backend=eager")} == keys


def test_figures_are_those_of_accuracy_and_densities_lie_at_their_targets(smoke):
    sparse = (*smoke, *TEXT, "axes.sparsity=teal", "params.sparsity.teal.level=0.5")
    found, series, facts = judged(*sparse)
    (case,) = cases_of("suite=accuracy", *sparse)
    same = facts_of(AccuracyTrial(case, Registry.load()))
    assert [found[metric.name] for metric in same.metrics] == list(same.metrics)
    assert facts.items == same.items
    assert found["target_density"].value == 0.5
    for site in ("input", "hidden"):
        assert found[f"density_{site}"].value == pytest.approx(0.5, abs=0.1)
        by_layer = series[f"density_{site}_by_layer"]
        assert len(by_layer) == 2
        assert sum(by_layer) / 2 == pytest.approx(found[f"density_{site}"].value)
    assert 0.4 < found["kept_flops"].value < 0.6
    assert found["calibration_elapsed"].value > 0


def test_metrics_of_layers_are_matched_by_name_and_one_that_a_layer_lacks_is_none():
    first = [Metric("a", 1.0, "1", n=2), Metric("b", 3.0, "1")]
    found = means([first, [Metric("b", 5.0, "1"), Metric("c", 7.0, "1")], [Metric("b", None, "1")]])
    assert [(metric.name, metric.value) for metric in found] == [("a", None), ("b", None), ("c", None)]
    (b,) = [metric for metric in means([first, first[::-1]]) if metric.name == "b"]
    assert b.value == 3.0


def test_a_site_that_one_layer_leaves_alone_has_figures(smoke, monkeypatch):
    greedy = ("axes.sparsity=teal", "params.sparsity.teal.allocation=greedy", "params.sparsity.teal.level=0.02")
    sites = iter(["input", "hidden"] * 4)
    monkeypatch.setattr(steps, "greedy_levels", lambda *args: {"input": 0.0, "hidden": 0.0, next(sites): 0.3})
    found, _, _ = judged(*smoke, *TEXT, *greedy)
    assert found["density_input"].value == pytest.approx(0.85, abs=0.05)
    assert found["density_hidden"].value == pytest.approx(0.85, abs=0.05)
    assert found["tls_input"].value is found["tls_hidden"].value is None  # of one layer of two


def test_what_neighbours_leave_out_together_is_less_the_more_they_are(smoke):
    found, series, _ = judged(*smoke, *TEXT, "axes.sparsity=teal", "params.sparsity.teal.level=0.7")
    for site in ("input", "hidden"):
        by_chunk = series[f"cls_by_chunk_{site}"]
        assert by_chunk[0] == found[f"tls_{site}"].value
        assert list(by_chunk) == sorted(by_chunk, reverse=True)
        assert series[f"cls_if_independent_{site}"] == tuple(by_chunk[0] ** length for length in CHUNKS)
        assert found[f"union_density_{site}"].value >= 1 - by_chunk[-1] - 1e-12


def test_calibration_is_done_anew_whatever_the_cache_keeps(smoke):
    sparse = (*smoke, *TEXT, "axes.sparsity=cats", "params.sparsity.cats.level=0.5")
    first, _, facts = judged(*sparse)
    again, _, repeated = judged(*sparse)
    assert min(one["calibration_elapsed"].value for one in (first, again)) > 0
    assert facts.items == repeated.items


def test_without_sparsity_there_is_no_target_and_nothing_is_left_out(smoke):
    found, series, _ = judged(*smoke, *TEXT, "axes.sparsity=none")
    assert found["target_density"].value is None
    assert found["calibration_elapsed"].value is None
    assert found["kept_flops"].value == found["density_input"].value == 1
    assert not [name for name in series if name.startswith("cls")]
    assert not [name for name in found if name.startswith("tls")]


def test_masked_weights_have_savings_and_no_sites(smoke):
    found, series, _ = judged(*smoke, *TEXT, "axes.sparsity=magnitude", "params.sparsity.magnitude.level=0.5")
    assert found["kept_flops"].value == pytest.approx(0.5, abs=0.01)
    assert found["density_input"].value == 1
    assert len(series["kept_flops_by_layer"]) == 2
    assert not [name for name in found if name.startswith("tls")]
