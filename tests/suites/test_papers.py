"""The claims: strict reading, the rules by which they are judged, and one row through real processes."""

from __future__ import annotations

import math
import random

import pytest
import scipy.stats
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moebench.bench.cli import main
from moebench.bench.papers import CLAIM_VIEWS, cut_to_runs, measured
from moebench.bench.run import planned
from moebench.contracts import MoebenchError, Registry
from moebench.moe.balance.load import eta, switch
from moebench.moe.routing import Routing
from moebench.results.claims import Rule, judge, mean_interval, student_quantile
from moebench.results.parts import write_part
from moebench.results.query import reading, run_sql, select
from moebench.results.schema import TABLES
from moebench.suites.moepp_trials import FFNTimeTrial, balanced_routing, deal, ffn_entries, ffn_share, whole_counts
from moebench.suites.paper_specs import choose_papers, load_papers, read_paper

PAPER = """\
key: toy
title: A paper (arXiv 0000.00000)
claim: it holds
figure: Table 1
ours: a toy
kind: empirical
run: {suite: selftest, overrides: [engine.processes=1]}
metric: SELECT seed, 1.0 AS a, 1.0 AS b FROM cases
rule: {direction: at_most, margin: 0.1, unit: ratio}
seeds: [0, 1, 2]
cost_s: 5
model: tiny
"""

# --- reading ---------------------------------------------------------------------------------------------------------


def test_a_whole_file_is_read():
    paper = read_paper(PAPER, "toy.yaml")
    assert paper.settings(1) == ["suite=selftest", "model=tiny", "engine.processes=1", "seed=1"]
    assert (paper.rule.direction, paper.rule.margin, paper.cost_s) == ("at_most", 0.1, 5.0)


def test_model_none_adds_no_setting():
    paper = read_paper(PAPER.replace("model: tiny", "model: none"), "toy.yaml")
    assert paper.settings(0) == ["suite=selftest", "engine.processes=1", "seed=0"]


@pytest.mark.parametrize("line", PAPER.splitlines())
def test_every_key_is_needed(line):
    key = line.partition(":")[0]
    with pytest.raises(MoebenchError, match=rf"papers/toy\.yaml: key '{key}' is missing"):
        read_paper(PAPER.replace(line + "\n", ""), "toy.yaml")


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("title:", "titel: x\ntitle:", "unknown key 'titel': did you mean 'title'"),
        ("kind: empirical", "kind: rumour", "key 'kind' must be one of identity, theorem, empirical"),
        ("direction: at_most", "direction: below", "key 'direction' must be one of"),
        ("margin: 0.1", "margin: wide", "key 'margin' must be of type float"),
        ("unit: ratio", "unit: ratio, tolerance: 1", "unknown key 'tolerance'"),
        ("suite: selftest, ", "", "key 'suite' is missing"),
        ("seeds: [0, 1, 2]", "seeds: [0, 1]", "needs 3 seeds"),
        ("seeds: [0, 1, 2]", "seeds: [0, 1, 1]", "seeds must be different"),
        ("seeds: [0, 1, 2]", "seeds: three", "key 'seeds' must be of type"),
        ("cost_s: 5", "cost_s: 0", "cost_s is in seconds"),
        ("engine.processes=1", "seed=3", "take them out of the overrides"),
        ("key: toy", "key: other", "name the file other.yaml"),
        ("run: {suite: selftest, overrides: [engine.processes=1]}", "run: selftest", "run must be a mapping"),
        ("title: A paper", "title: [", "cannot be read"),
        ("key: toy", "key: toy\nkey: toy", "cannot be read"),
        (PAPER, "- toy\n", "must be a mapping"),
    ],
)
def test_what_is_wrong_is_told_with_the_file(old, new, says):
    assert old in PAPER
    with pytest.raises(MoebenchError) as caught:
        read_paper(PAPER.replace(old, new), "toy.yaml")
    assert str(caught.value).startswith("papers/toy.yaml")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_mistyped_key_gets_a_suggestion():
    with pytest.raises(MoebenchError, match="did you mean 'teal-25'"):
        choose_papers(load_papers(), ["teal25"])


# --- the papers that come with moebench ------------------------------------------------------------------------------


@pytest.fixture
def empty(tmp_path):
    folder = tmp_path / "empty"
    folder.mkdir()
    return folder


@pytest.fixture(scope="module")
def no_runs(tmp_path_factory):
    with reading(tmp_path_factory.mktemp("empty")) as connection:
        cut_to_runs(connection, [])
        yield connection


@pytest.fixture(scope="module")
def registry():
    return Registry.load()


@pytest.mark.parametrize("paper", load_papers(), ids=lambda paper: paper.key)
def test_every_paper_can_be_planned_and_its_metric_read(paper, registry, no_runs):
    registry.get("suite", paper.run.suite)
    names, rows = select(no_runs, paper.metric)
    assert names == ["seed", "a", "b"]
    assert rows == []


def test_there_are_moepp_and_teal():
    assert {"moepp-balance", "moepp-time-25", "moepp-time-75", "teal-25", "teal-50"} <= {p.key for p in load_papers()}


def test_the_list_names_every_claim_and_its_cost(capsys):
    assert main(["papers", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for paper in load_papers():
        assert any(line.startswith(paper.key) and f"{paper.cost_s:.0f} s" in line for line in lines)


def test_a_metric_sees_the_runs_of_its_claim_only(tmp_path):
    for run_id, value in (("r1", 1.0), ("r2", 2.0), ("r3", 3.0)):
        case = {"run_id": run_id, "case_key": "c", "seed": int(value), "status": "ok", "flags": [], "suite": "s"}
        metric = {"run_id": run_id, "case_key": "c", "name": "m", "value": value}
        write_part(tmp_path / "runs" / run_id, "part", {"cases": [case], "metrics": [metric]})
    sql = "SELECT seed, value AS a, value * 2 AS b FROM metrics ORDER BY seed"
    assert measured(tmp_path, ["r1", "r3"], sql)[0] == [(1, 1.0, 2.0), (3, 3.0, 6.0)]
    assert measured(tmp_path, ["r2'; DROP TABLE cases; --"], sql)[0] == []
    for view in CLAIM_VIEWS:
        counted = f"SELECT 0 AS seed, count(*) AS a, count(*) AS b FROM {view} WHERE run_id = 'r2'"
        assert measured(tmp_path, ["r1", "r3"], counted)[0] == [(0, 0.0, 0.0)]


@pytest.mark.parametrize("sql", ["SELECT seed FROM cases", "DROP VIEW metrics", "SELECT 1; SELECT 2"])
def test_a_metric_that_is_no_select_of_seed_a_b_is_refused(sql, empty):
    with pytest.raises(Exception, match=r"seed, a, b|one SELECT"):
        measured(empty, [], sql)


# --- judging ---------------------------------------------------------------------------------------------------------

finite = st.floats(-1e3, 1e3)
positive = st.floats(1e-3, 1e3)
rules = st.builds(
    Rule, st.sampled_from(["equal", "at_most", "at_least"]), st.floats(0, 10), st.sampled_from(["ratio", "difference"])
)
pairs = st.lists(st.tuples(positive, positive), min_size=3, max_size=6).map(
    lambda values: [(seed, a, b) for seed, (a, b) in enumerate(values)]
)


@given(rules, pairs, st.sampled_from(["identity", "theorem"]))
def test_an_exact_claim_holds_where_every_pair_lies_in_the_region(rule, pairs, kind):
    least, most = rule.region
    inside = all(least <= rule.value(a, b) <= most for _, a, b in pairs)
    assert judge(kind, rule, range(len(pairs)), pairs).verdict == ("holds" if inside else "fails")


@given(rules, pairs)
def test_an_empirical_verdict_follows_from_its_interval(rule, pairs):
    found = judge("empirical", rule, range(len(pairs)), pairs)
    assume(not rule.tied([rule.value(a, b) for _, a, b in pairs]))
    least, most = rule.region
    assert found.lo <= found.estimate <= found.hi
    assert (found.verdict == "supported") == (least <= found.lo and found.hi <= most)
    assert (found.verdict == "not supported") == (found.hi < least or found.lo > most)


@given(rules, pairs, st.floats(1.01, 3))
def test_a_wider_margin_never_takes_support_away(rule, pairs, factor):
    assume(rule.direction != "at_least")
    wider = Rule(rule.direction, rule.margin * factor, rule.unit)
    if judge("empirical", rule, range(len(pairs)), pairs).verdict == "supported":
        assert judge("empirical", wider, range(len(pairs)), pairs).verdict == "supported"


@given(pairs, st.floats(0.01, 1))
def test_at_most_and_at_least_exclude_each_other(pairs, margin):
    verdicts = {
        direction: judge("empirical", Rule(direction, margin, "ratio"), range(len(pairs)), pairs).verdict
        for direction in ("at_most", "at_least")
    }
    if verdicts["at_most"] == "not supported":
        assert verdicts["at_least"] == "supported"


@pytest.mark.parametrize("unit", ["ratio", "difference"])
@pytest.mark.parametrize("direction", ["at_most", "at_least"])
def test_pairs_that_are_equal_in_every_seed_support_nothing_that_asks_for_better(direction, unit):
    """A workload whose figures are at their end says the same of every method."""
    ties = [(seed, 2.0, 2.0) for seed in range(3)]
    found = judge("empirical", Rule(direction, 0.0, unit), range(3), ties)
    assert (found.verdict, found.reason) == ("inconclusive", "a equals b in every seed, so nothing was told apart")
    slack = 0.1 if direction == "at_most" else -0.1
    assert judge("empirical", Rule(direction, slack, unit), range(3), ties).verdict == "supported"
    assert judge("empirical", Rule("equal", 0.0, unit), range(3), ties).verdict == "supported"
    assert judge("identity", Rule(direction, 0.0, unit), range(3), ties).verdict == "holds"


def test_a_missing_seed_keeps_an_exact_claim_from_holding():
    rule = Rule("equal", 0.1, "difference")
    found = judge("theorem", rule, [0, 1], [(0, 1.0, 1.0)])
    assert (found.verdict, found.reason) == ("inconclusive", "no result for seed 1")
    assert judge("theorem", rule, [0, 1], [(0, 1.0, 2.0)]).verdict == "fails"
    assert judge("theorem", rule, [0], []).verdict == "inconclusive"


def test_two_seeds_decide_nothing_and_one_seed_counts_once():
    rule = Rule("equal", 0.1, "ratio")
    assert judge("empirical", rule, [0, 1], [(0, 1.0, 1.0), (1, 1.0, 1.0)]).verdict == "inconclusive"
    twice = judge("empirical", rule, [0], [(0, 1.0, 1.0)] * 3)
    assert twice.verdict == "inconclusive"
    assert "several results" in twice.reason


def test_a_ratio_of_nothing_is_told():
    assert judge("empirical", Rule("equal", 0.1, "ratio"), [0], [(0, 0.0, 1.0)]).verdict == "inconclusive"
    assert judge("identity", Rule("equal", 0.1, "ratio"), [0], [(0, 1.0, -1.0)]).verdict == "fails"


def test_a_rule_must_make_sense():
    for bad in (
        ("below", 0.1, "ratio"),
        ("equal", 0.1, "percent"),
        ("equal", -0.1, "ratio"),
        ("equal", math.nan, "ratio"),
    ):
        with pytest.raises(ValueError, match="margin"):
            Rule(*bad)


@given(st.integers(1, 60), st.floats(0.5, 0.999))
def test_student_quantile_is_that_of_scipy(freedom, level):
    assert student_quantile(freedom, level) == pytest.approx(scipy.stats.t.ppf((1 + level) / 2, freedom), rel=1e-7)


def test_the_interval_of_a_mean_covers_it_as_often_as_it_says():
    rng = random.Random(0)
    hits = 0
    for _ in range(1000):
        _, lo, hi = mean_interval([rng.gauss(3, 2) for _ in range(3)])
        hits += lo <= 3 <= hi
    assert 925 <= hits <= 972


# --- MoE++ -----------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.integers(1, 12), st.integers(1, 6), st.floats(0.1, 1.0), st.integers(1, 3), st.integers(0, 9))
def test_the_balanced_routing_has_the_load_of_the_optimum(ffn, others, tau, k, seed):
    tokens = 48
    assume(k <= tau * ffn + others)
    kinds = ("ffn",) * ffn + ("zero",) * others
    routing = balanced_routing(kinds, tau, tokens, k, torch.Generator().manual_seed(seed))
    assert (routing.k_T == k).all()
    assert len({*zip(routing.token_N.tolist(), routing.expert_N.tolist(), strict=True)}) == k * tokens
    share_E = 1 / eta(kinds, tau).double()
    assert (routing.counts_E - share_E / share_E.sum() * k * tokens).abs().max() < 1 + 1e-9
    kept = ffn_entries(routing, kinds)
    assert kept.num_experts == ffn
    assert torch.equal(kept.counts_E, routing.counts_E[:ffn])
    assert abs(len(kept.token_N) / (k * tokens) - ffn_share(tau, ffn, others)) <= ffn / (k * tokens)


def test_ffn_entries_are_numbered_in_the_order_of_ids():
    kinds = ("zero", "ffn", "copy", "ffn")
    routing = Routing.topk(torch.tensor([[0, 3], [1, 2]]), torch.full((2, 2), 0.5), 4)
    kept = ffn_entries(routing, kinds)
    assert (kept.token_N.tolist(), kept.expert_N.tolist()) == ([0, 1], [1, 0])


def test_too_much_for_one_expert_cannot_be_dealt():
    with pytest.raises(ValueError, match="cannot be dealt"):
        deal(torch.tensor([5, 3]), 4, torch.Generator())
    assert whole_counts(torch.tensor([0.5, 0.25, 0.25]), 7).tolist() == [3, 2, 2]


@pytest.mark.parametrize("tau", [0.25, 0.75])
def test_our_balance_loss_attains_the_minimum_at_the_balanced_load(tau):
    """The loss as it is implemented, at a Routing whose f and P are those of the optimum, is at its least, 1."""
    kinds, k, tokens = ("ffn",) * 8 + ("zero", "copy", "constant", "constant"), 2, 2400
    routing = balanced_routing(kinds, tau, tokens, k, torch.Generator().manual_seed(0))
    routing = Routing(
        routing.token_N, routing.expert_N, routing.weight_N, routing.shape, probs_TE=routing.to_dense().float()
    )
    assert float(switch(routing, eta_E=eta(kinds, tau), slots=k)) == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize("tau", [0.25, 0.75])
def test_the_timed_layer_is_the_ffn_part_at_the_balanced_share(tau):
    registry = Registry.load()
    plan, _ = planned(["suite=moepp_time", "model=tiny", "axes.tokens=64", f"params.routing.moepp.tau={tau}"], registry)
    assert len({case.group_key for case in plan.cases}) == 1
    flops = {}
    for case in plan.cases:
        trial = FFNTimeTrial(case, registry)
        trial.begin_turn()
        for step in range(trial.steps):
            assert trial.verify(step, trial.run(step)).ok
        assert not trial.verify(0, trial.run(0) + 1).ok
        flops[case.routing.name] = trial.cost(0).flops
        trial.close()
    assert flops["moepp"] / flops["topk"] == pytest.approx(ffn_share(tau, 8, 4), abs=8 / 128)
    assert flops["moepp"] < flops["topk"]


# --- through real processes ------------------------------------------------------------------------------------------


def test_the_theorem_holds_through_real_processes(tmp_path, capsys):
    store = tmp_path / "store"
    assert main(["papers", "moepp-balance", "--quiet", "--store", str(store)]) == 0
    assert capsys.readouterr().out.split()[:2] == ["moepp-balance", "holds"]
    csv = run_sql(store, "SELECT kind, verdict, len(seeds), len(a), lo <= hi, model FROM claims", format="csv")
    assert csv.splitlines()[1] == "theorem,holds,6,6,true,none"
    shares = run_sql(
        store, "SELECT DISTINCT round(value, 6) FROM metrics WHERE name = 'ffn_share' ORDER BY 1", format="csv"
    )
    assert shares.split()[-2:] == ["0.333333", "0.6"]


def test_a_claim_that_fails_ends_the_command_with_1(tmp_path, monkeypatch, capsys):
    (paper,) = choose_papers(load_papers(), ["moepp-balance"])
    text = f"key: wrong\n{_yaml_of(paper)}"
    wrong = read_paper(text, "wrong.yaml")
    monkeypatch.setattr("moebench.bench.papers.load_papers", lambda: [wrong])
    assert main(["papers", "--quiet", "--store", str(tmp_path / "store")]) == 1
    assert "fails" in capsys.readouterr().out


def _yaml_of(paper):
    """Return the paper without its key, one seed, and b moved away from the formula."""
    return (
        "title: t\nclaim: c\nfigure: f\nours: o\nkind: theorem\n"
        f"run: {{suite: {paper.run.suite}, overrides: {list(paper.run.overrides)}}}\n"
        "metric: SELECT seed, value AS a, value + 0.01 AS b FROM metrics WHERE name = 'ffn_share'\n"
        "rule: {direction: equal, margin: 1.0e-6, unit: difference}\nseeds: [0]\ncost_s: 5\nmodel: none\n"
    )


def test_claims_have_the_columns_of_the_schema(tmp_path):
    from moebench.bench.papers import Result, claim_row

    paper = read_paper(PAPER, "toy.yaml")
    pairs = [(seed, 1.0, 1.0) for seed in range(3)]
    judgement = judge("empirical", Rule("at_most", 0.1, "ratio"), [0, 1, 2], pairs)
    row = claim_row(Result(paper, judgement, pairs, ["r"], False), "r")
    assert set(row) == set(TABLES["claims"])
    assert row["verdict"] == "supported"
