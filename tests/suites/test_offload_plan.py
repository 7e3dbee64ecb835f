"""What suite ``offload`` plans: measured cases, the rows that predict them, and what it refuses, each in a sentence."""

from __future__ import annotations

import pytest

from moebench.bench.config import load
from moebench.bench.plan import make_plan
from moebench.contracts import Evidence, Registry
from moebench.suites.offload_plugins import MOST_STEPS, OffloadSuite

REGISTRY = Registry.load()


@pytest.fixture(autouse=True)
def _cache(cache, monkeypatch):
    monkeypatch.setenv("MOEBENCH_CACHE", str(cache))


def plan(*settings, suite="offload"):
    return make_plan(load([f"suite={suite}", "model=tiny", *settings], REGISTRY, 2.0**32, 2.0**20), REGISTRY, 2.0**32)


def refusals(*settings, suite="offload"):
    return [item.refusal for item in plan(*settings, suite=suite).refused]


def test_one_measured_case_a_backend_and_one_that_predicts_each_of_offload():
    planned = plan("params.backend.offload.policy=[lru,belady]")
    assert not planned.refused
    measured, predicted = planned.groups
    assert [(case.backend.name, case.evidence) for case in measured.cases] == [
        ("offload", Evidence.MEASURED_CPU),
        ("offload", Evidence.MEASURED_CPU),
        ("eager", Evidence.MEASURED_CPU),
    ]
    assert all(case.protocol == "timed" and case.layers == (0, 1, 2, 3) for case in measured.cases)
    assert [(case.backend.params["policy"], case.evidence) for case in predicted.cases] == [
        ("lru", Evidence.MODEL),
        ("belady", Evidence.MODEL),
    ]
    assert all(case.protocol == "once" for case in predicted.cases)
    assert {case.method_key for case in planned.cases} == {measured.cases[0].method_key}


def test_predictions_can_be_left_out_and_change_no_measured_case():
    with_, without = plan(), plan("suite.predicted=false")
    assert [case.case_key for case in without.cases] == [case.case_key for case in with_.groups[0].cases]


@pytest.mark.parametrize(
    "setting",
    ["suite.steps=8", "suite.feed=generated", "suite.order=token"],
)
def test_what_changes_the_work_changes_the_group(setting):
    assert plan(setting).groups[0].name != plan().groups[0].name


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["axes.pass=forward_backward"], "use axes.pass=forward"),
        (["suite.batching=expert_aware", "axes.traffic=gaussian"], "use a traffic that forces them"),
        (["axes.routing=expert_choice"], "looks at later tokens"),
        (["axes.routing=moepp"], "experts without weights"),
        (["params.backend.offload.policy=lur", "axes.backend=offload"], "did you mean 'lru'"),
        (["params.backend.offload.policy=pattern", "axes.backend=offload"], "lacks its argument"),
        (["params.backend.offload.execution=fiddler", "axes.backend=offload"], "use tier=host"),
        (["params.backend.offload.execution=hobbit", "axes.backend=offload"], "low=int4"),
        (["params.backend.offload.low=gptq", "axes.backend=offload"], "is calibrated"),
    ],
)
def test_what_cannot_run_is_refused_in_a_sentence(settings, words):
    found = refusals(*settings)
    assert found
    assert all(words.lower() in text.lower() for text in found), found
    assert all(text == text.strip() and "\n" not in text for text in found), found


def test_what_looks_ahead_is_played_here_and_nowhere_else():
    setting = ("params.backend.offload.policy=[belady,'belady:4']", "axes.backend=offload")
    assert not refusals(*setting)
    found = refusals(*setting, suite="throughput")
    assert len(found) >= 2
    assert all("use suite=offload, which replays a trace" in text for text in found)


@pytest.mark.parametrize("values", [{"steps": 0}, {"steps": MOST_STEPS + 1}, {"prompt": 0}, {"patience": -1}])
def test_numbers_that_make_no_sense_are_named(values):
    with pytest.raises(ValueError, match=f"{next(iter(values))}={next(iter(values.values()))}"):
        OffloadSuite(**values)
