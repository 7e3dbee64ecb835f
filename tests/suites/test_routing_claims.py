"""Claims about routing: each has a paper's row, is computed soundly, and could fail."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from importlib import import_module

import pytest

from moebench.bench.cli import main
from moebench.bench.run import planned
from moebench.contracts import MoebenchError, Registry
from moebench.moe.capacity import CapacityRule
from moebench.moe.gather.retrieval import leading_vectors
from moebench.results.claims import Rule, judge
from moebench.results.query import run_sql
from moebench.suites.claims_plugins import FAMILIES, FAMILY_OF
from moebench.suites.paper_specs import load_papers
from moebench.suites.routing_claims.base import Outcome, Scene
from moebench.suites.routing_claims.trial import ClaimTrial, claim_of

REGISTRY = Registry.load()
PAPERS = {paper.key: paper for paper in load_papers() if paper.run.suite == "routing_claims"}
CASES = {case.workload["claim"]: case for case in planned(["suite=routing_claims"], REGISTRY)[0].cases}
every_claim = pytest.mark.parametrize("name", FAMILY_OF)


@cache
def outcome_of(name):
    return claim_of(name)(Scene(REGISTRY, 0))


def verdict(name, outcome):
    """What the paper's rule says if every seed has this outcome."""
    paper = PAPERS[name]
    pairs = [(seed, outcome.a, outcome.b) for seed in range(3)]
    return judge(paper.kind, Rule(paper.rule.direction, paper.rule.margin, paper.rule.unit), range(3), pairs).verdict


# --- rows and names --------------------------------------------------------------------------------------------------


def test_every_claim_has_a_row_and_every_row_a_claim():
    assert set(PAPERS) == set(FAMILY_OF)
    assert sum(map(len, FAMILIES.values())) == len(FAMILY_OF), "a name is in two families"
    for name, paper in PAPERS.items():
        assert list(paper.run.overrides) == [f"suite.claim={name}"]
        assert paper.model == "none"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_module_has_the_claims_that_the_parent_names(family):
    assert tuple(import_module(f"moebench.suites.routing_claims.{family}").CLAIMS) == FAMILIES[family]


def test_one_claim_or_all_are_planned_as_cases_of_their_own():
    assert set(CASES) == set(FAMILY_OF)
    assert len({case.case_key for case in CASES.values()}) == len(FAMILY_OF)
    (case,) = planned(["suite=routing_claims", "suite.claim=peer-exact", "seed=7"], REGISTRY)[0].cases
    assert (case.workload, case.protocol, case.seed) == ({"claim": "peer-exact"}, "once", 7)
    with pytest.raises(MoebenchError, match="unknown claim 'per-exact': did you mean 'peer-exact'"):
        planned(["suite=routing_claims", "suite.claim=per-exact"], REGISTRY)


# --- computing -------------------------------------------------------------------------------------------------------


@every_claim
def test_a_claim_is_computed_soundly(name):
    outcome = outcome_of(name)
    assert outcome.sound, outcome.reason
    assert all(map(math.isfinite, (outcome.a, outcome.b, *outcome.figures.values())))


@every_claim
def test_an_exact_claim_agrees_with_its_rule(name):
    """Empirical verdicts fall either way; identities and theorems are our own code's promise."""
    assert PAPERS[name].kind == "empirical" or verdict(name, outcome_of(name)) == "holds"


def test_a_claim_depends_on_its_seed_and_on_nothing_else():
    first, again, other = (claim_of("got-clusters")(Scene(REGISTRY, seed)) for seed in (0, 0, 1))
    assert first == again
    assert first.a != other.a


def test_a_trial_hands_on_numbers_and_their_soundness():
    trial = ClaimTrial(CASES["scmoe-weak"], REGISTRY)
    assert trial.facts().metrics == ()
    outcome = trial.run(0)
    assert trial.verify(0, outcome).ok
    assert [(metric.name, metric.value) for metric in trial.facts().metrics] == [("claim_a", 1.0), ("claim_b", 1.0)]
    unsound = trial.verify(0, replace(outcome, sound=False, reason="nothing was dropped"))
    assert (unsound.ok, unsound.reason) == (False, "nothing was dropped")
    assert not trial.verify(0, Outcome(math.nan, 0.0, True, "")).ok


# --- every rule can fail ---------------------------------------------------------------------------------------------


@every_claim
def test_a_value_beyond_the_margin_does_not_pass(name):
    paper, outcome = PAPERS[name], outcome_of(name)
    rule = Rule(paper.rule.direction, paper.rule.margin, paper.rule.unit)
    edge = rule.region[0] if rule.direction == "at_least" else rule.region[1]
    beyond = edge - 0.02 if rule.direction == "at_least" else edge + 0.02
    wrong = replace(outcome, a=beyond * outcome.b if rule.unit == "ratio" else outcome.b + beyond)
    assert verdict(name, wrong) in ("fails", "not supported")


class OtherRouters(Scene):
    """A Scene that takes other routers than it is asked for."""

    def __init__(self, instead):
        super().__init__(REGISTRY, 0)
        self.instead = instead

    def router(self, routing, shape, rows_EH=None, params=None):
        if routing in self.instead:
            routing, params = self.instead[routing]
        return super().router(routing, shape, rows_EH, params)


@pytest.mark.parametrize(
    ("name", "routing", "instead", "params"),
    [
        ("mixtral-renormalised", "mixtral", "olmoe", {"k": 2}),
        ("moe-llava-upcycled", "moe_llava", "dit_moe", {}),
        ("gshard-second", "gshard", "gshard", {"second": "gumbel"}),
        ("xmoe-length", "xmoe", "xmoe", {"bias": True}),
        ("deepseek-apart", "deepseek_v3", "deepseek_v3", {"scale": 1.0}),
        ("deepseek-groups", "deepseek_v3", "deepseek_v3", {"groups_kept": 8}),
        ("expert-choice-load", "expert_choice", "mixtral", {}),
        ("expert-choice-variable", "expert_choice", "mixtral", {}),
        ("hash-free", "hash", "switch", {}),
        ("thor-uniform", "thor", "switch", {}),
        ("adamoe-share", "adamoe", "adamoe", {"k": 4, "null": 5}),
        ("remoe-continuous", "remoe", "switch", {}),
        ("top-p-share", "top_p", "top_p", {"p": 0.95}),
        ("top-p-harder", "top_p", "mixtral", {}),
        ("evomoe-falls", "dense_to_sparse", "dense_to_sparse", {"start": 0.1, "end": 10.0, "hard": None}),
        ("evomoe-one", "dense_to_sparse", "dense_to_sparse", {"hard": None}),
        ("temperature-tied", "dense_to_sparse", "activation_gate", {}),
        ("activation-frees", "activation_gate", "dense_to_sparse", {}),
        ("activation-relu", "activation_gate", "activation_gate", {"activation": "tanh"}),
        ("dselect-k-saturated", "dselect_k", "dselect_k", {}),
        ("dselect-k-continuous", "dselect_k", "switch", {}),
        ("comet-saturated", "comet", "comet", {}),
        ("comet-simplex", "comet", "dselect_k", {"init": 1.0}),
        ("got-clusters", "got_similarity", "mixtral", {}),
        ("m3vit-task", "m3vit", "m3vit", {"tasks": 2}),
        ("moiie-apart", "moiie", "uni_moe", {}),
        ("moex-firing", "moex", "uni_moe", {}),
        ("moex-sparser", "moex", "uni_moe", {}),
        ("mofme-released", "mofme", "mofme", {"dropout": 0.1}),
    ],
)
def test_a_claim_about_another_router_does_not_pass(name, routing, instead, params):
    outcome = claim_of(name)(OtherRouters({routing: (instead, params)}))
    assert verdict(name, outcome) in ("fails", "not supported")


PACKAGE = "moebench.suites.routing_claims"


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("uoe-dense", "slices.moe_forward"),
        ("uoe-attention", "slices.attention_pairs"),
        ("mohd-dense", "slices.mohd_forward"),
        ("bam-dense", "slices.attend"),
        ("moex-wide", "experts.moe_forward"),
        ("mofme-merged", "experts.film_merged"),
        ("time-moe-active", "experts.counted_flops"),
        ("read-me-sliced", "context.moe_forward"),
    ],
)
def test_a_claim_about_results_that_are_off_by_one_percent_does_not_pass(name, place, monkeypatch):
    module, attribute = place.split(".")
    right = getattr(import_module(f"{PACKAGE}.{module}"), attribute)
    monkeypatch.setattr(f"{PACKAGE}.{place}", lambda *given, **named: 1.01 * right(*given, **named))
    assert verdict(name, claim_of(name)(Scene(REGISTRY, 0))) == "fails"


@pytest.mark.parametrize(
    ("name", "place", "wrong"),
    [
        ("gshard-priority", "topk.CapacityRule", lambda factor, k, first_choices=False: CapacityRule(factor, k)),
        ("zcode-rts", "load.CapacityRule", lambda factor, policy: CapacityRule(factor)),
        ("zcode-aoe", "load.aggregate", lambda first, second: first),
        ("scmoe-greedy", "contrast.contrast", lambda strong_BV, weak_BV, params: strong_BV - weak_BV),
        ("ultramem-positive", "memory.leading_vectors", lambda core: tuple(-v for v in leading_vectors(core))),
    ],
)
def test_a_claim_about_something_else_does_not_pass(name, place, wrong, monkeypatch):
    monkeypatch.setattr(f"{PACKAGE}.{place}", wrong)
    assert verdict(name, claim_of(name)(Scene(REGISTRY, 0))) in ("fails", "not supported")


# --- through a real process ------------------------------------------------------------------------------------------


def test_a_claim_is_judged_through_a_real_process(tmp_path, capsys):
    store = tmp_path / "store"
    assert main(["papers", "pr-moe-parameters", "--quiet", "--store", str(store)]) == 0
    assert capsys.readouterr().out.split()[:2] == ["pr-moe-parameters", "holds"]
    figures = "SELECT name, round(value, 1) AS value FROM metrics WHERE name IN ('standard', 'pr_moe') ORDER BY name"
    assert run_sql(store, figures, format="csv").splitlines()[1:] == ["pr_moe,30.5", "standard,51.5"]
