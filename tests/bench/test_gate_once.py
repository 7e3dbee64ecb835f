"""Evaluations in a gate: both sides run them once, in workers of their own, and their items are judged in pairs."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from moebench.bench.gate.cases import Cases, backend_cases, planned_cases
from moebench.bench.gate.command import run_gate
from moebench.bench.gate.config import GateConfig, PairedCase
from moebench.bench.gate.sides import Side
from moebench.bench.run import planned
from moebench.contracts import MoebenchError, Registry
from moebench.dashboards.gate_text import gate_table
from moebench.results.gate import Exit
from moebench.results.query import reading

pytest.importorskip("transformers")

PLUGIN = str(Path(__file__).parent.parent / "plugins" / "slightly_wrong.py")
SHORT = ("model=tiny-olmoe", "model.layers=moe", "suite.tokens=512", "suite.window=128")
HERE = {side: Side(side, sys.executable, {}, None, side) for side in ("base", "candidate")}


@pytest.fixture(autouse=True)
def _cache(cache, monkeypatch):
    monkeypatch.setenv("MOEBENCH_CACHE", str(cache))


def case_of(*settings, plugins=()):
    (case,) = planned([*SHORT, *settings], Registry.load(plugins))[0].cases
    return case


def gated(tmp_path, *pairs, plugins=(), **config):
    cases = Cases((), (), tuple(PairedCase(name, base, candidate) for name, base, candidate in pairs))
    return run_gate(HERE, cases, GateConfig(**config), tmp_path / "store", plugins)


@pytest.fixture(scope="module")
def found(cache, tmp_path_factory):
    """One gate over three pairs of methods and one of backends, with a margin for KL; returns (result, store)."""
    folder = tmp_path_factory.mktemp("gated")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOEBENCH_CACHE", str(cache))
        plain = case_of("suite=accuracy")
        four = case_of(
            "suite=accuracy",
            "axes.quantization=int4",
            "params.quantization.int4.group=32",
            "params.quantization.int4.symmetric=true",
        )
        other_text = replace(plain, seed=1)
        pairs = [("same", plain, plain), ("worse", plain, four), ("other text", plain, other_text)]
        base = case_of("suite=backend_kl", "axes.backend=eager")
        wrong = case_of("suite=backend_kl", "axes.backend=slightly_wrong", plugins=[PLUGIN])
        pairs.append(("eager to wrong", base, wrong))
        return gated(folder, *pairs, plugins=[PLUGIN], item_margins={"kl_to_dense": 0.001}), folder / "store"


def verdicts(result, label):
    return {one.metric.split()[0]: one for one in result.judged if one.label == label}


def test_the_same_method_is_the_same_item_by_item(found):
    same = verdicts(found[0], "same")
    assert {"nll", "kl_to_dense", "top1_agreement"} <= set(same)
    assert all(one.verdict == "equivalent" for one in same.values())
    assert same["nll"].reason == "all 16 items are the same"


def test_a_worse_method_regresses_with_an_interval(found):
    agreement = verdicts(found[0], "worse")["top1_agreement"]
    assert (agreement.verdict, agreement.kind, agreement.pairs, agreement.margin) == ("regressed", "accuracy", 16, 0.01)
    assert agreement.lo <= agreement.ratio <= agreement.hi < -0.01
    kl = verdicts(found[0], "worse")["kl_to_dense"]
    assert (kl.verdict, kl.margin) == ("regressed", 0.001)
    assert 0.001 < kl.lo <= kl.hi < 0.01, "the margin that nobody gives would not be passed"
    assert found[0].exit == Exit.REGRESSED


def test_other_texts_are_not_compared(found):
    assert {one.label: one.status for one in found[0].skipped} == {
        "other text": "inputs differ",
        "eager to wrong": "broken",
    }
    assert found[0].covered == 2
    assert found[0].asked_cases == 4


def test_it_is_told_and_kept(found):
    result, store = found
    table = gate_table(result)
    assert "candidate - base" in table
    assert "top1_agreement (text-" in table
    with reading(store) as connection:
        rows = connection.execute("SELECT kind, metric, verdict FROM comparisons WHERE label = 'worse'").fetchall()
    assert ("accuracy", verdicts(result, "worse")["top1_agreement"].metric, "regressed") in rows


def test_a_margin_is_of_a_metric_that_is_judged():
    with pytest.raises(MoebenchError, match="items of 'ac' are not judged"):
        GateConfig(item_margins={"ac": 0.1})


def test_a_backend_that_is_slightly_wrong_is_broken_and_named(found):
    (wrong,) = [one for one in found[0].skipped if one.label == "eager to wrong"]
    assert wrong.status == "broken"
    assert "layer 0, expert 3 is off" in wrong.reason


def test_plans_say_which_cases_run_once():
    from moebench.bench.config import load

    registry = Registry.load([PLUGIN])
    once = planned_cases(load(["suite=accuracy", *SHORT], registry, 2.0**33, 2.0**20), registry, 2.0**33)
    assert (len(once.batches), len(once.once), once.count) == (0, 1, 1)
    settings = ["suite=backend_kl", *SHORT, "axes.backend=[eager,grouped]"]
    pairs = backend_cases(load(settings, registry, 2.0**33, 2.0**20), registry, 2.0**33, "eager", "grouped")
    (pair,) = pairs.once
    assert (pair.base.backend.name, pair.candidate.backend.name) == ("eager", "grouped")


def test_a_spent_budget_leaves_cases_out(tmp_path):
    plain = case_of("suite=accuracy")
    result = gated(tmp_path, ("late", plain, plain), budget=1e-6)
    assert [one.status for one in result.skipped] == ["left out"]
    assert result.exit == Exit.INCONCLUSIVE
