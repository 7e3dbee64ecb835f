"""Bits per expert: PMQ is the optimum, budgets hold, and calibration says what the matrices really read."""

import itertools
import math
import sys
import typing

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moebench.contracts import MoebenchError, Scheme, build_params
from moebench.moe.bits.allocate import RULES, Features, allocate
from moebench.moe.bits.allocators import (
    by_layer,
    greedy,
    kind_first,
    layers_first,
    least_first,
    most_first,
    promote,
    protect,
    shuffled,
    uniform,
)
from moebench.moe.bits.balanced import draw_balanced, extra_traffic
from moebench.moe.bits.budget import Costs, stored_bits
from moebench.moe.bits.calibration import calibrate, calibrate_routed
from moebench.moe.bits.cosine_predictor import fit_predictor
from moebench.moe.bits.params import Allocation, By, CosinePredictor
from moebench.moe.bits.pmq import objective, pmq
from moebench.moe.bits.scores import block_cosine, expert_outlier_scores, outlier_score, token_cosines
from moebench.moe.bits.sensitivity import sensitivities
from moebench.moe.channels import SiteRule, Sparsity
from moebench.moe.experts import ExpertStore
from moebench.moe.layer import PreparedLayer, SharedExpert, ffn_hidden, moe_forward
from moebench.moe.plugins import Int8
from moebench.moe.quantization import coded, quantize
from moebench.moe.router import Linear, Pipeline, Softmax, TopK
from moebench.moe.routing import Context, Routing

H, F, T, K = 8, 6, 40, 2
KINDS = ("ffn", "zero", "ffn", "ffn", "ffn")
CHOICES = (1, 2, 3)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_store(sparsity=None):
    return ExpertStore(randn(4, 2 * F, H, seed=1), randn(4, H, F, seed=2), KINDS, sparsity=sparsity)


def make_router(renormalize=True, k=K):
    return Pipeline(Linear(randn(len(KINDS), H, seed=3)), TopK(k), Softmax(renormalize=renormalize))


def equal_costs(experts, overhead=0):
    return Costs(CHOICES, (tuple(100 * bits + overhead for bits in CHOICES),) * experts, (100,) * experts)


# --- budgets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("group", [None, 4, 12])
@pytest.mark.parametrize("symmetric", [True, False])
def test_stored_bits_are_the_bytes_that_are_packed(bits, group, symmetric):
    scheme = Scheme("rtn", float(bits), group, symmetric)
    packed = [quantize(randn(rows, 12), scheme) for rows in (5, 7)]
    assert stored_bits(scheme, [(5, 12), (7, 12)]) == 8 * sum(weight.nbytes for weight in packed)


def test_a_row_of_codes_fills_whole_bytes():
    assert stored_bits(Scheme("rtn", 3.0, None, True), [(2, 5)]) == 2 * (16 + 16)
    assert stored_bits(Scheme("rtn", 1.0, 3, False), [(1, 9)]) == 16 + 3 * 32


def test_average_bits_of_an_expert_include_scale_and_zero_of_each_group():
    schemes = [Scheme("rtn", float(bits), 64, False) for bits in (2, 4)]
    costs = Costs.of(schemes, [[(256, 128), (128, 128)]] * 2)
    assert costs.average((2, 2)) == 2.5
    assert costs.average((2, 4)) == 3.5
    assert costs.weights_U == (384 * 128, 384 * 128)


def test_a_budget_is_the_decimal_that_is_written():
    costs = Costs((4, 5), ((400, 500),), (100,))
    assert 4.35 * 100 < 435
    assert costs.allowed(4.35) == 435


# --- every rule keeps the budget -------------------------------------------------------------------------------------


@st.composite
def layers_of_units(draw):
    """Return (costs, features) of a few layers with units of unequal size."""
    layers, each = draw(st.integers(1, 3)), draw(st.integers(2, 4))
    units = layers * each
    sizes = draw(st.lists(st.integers(1, 9), min_size=units, max_size=units))
    overheads = draw(st.lists(st.integers(0, 30), min_size=units, max_size=units))
    stored = tuple(
        tuple(10 * size * bits + over for bits in CHOICES) for size, over in zip(sizes, overheads, strict=True)
    )
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    numbers = [tuple(rng.random(units).tolist()) for _ in range(4)]
    features = Features(
        tuple(np.repeat(np.arange(layers), each).tolist()),
        tuple(range(each)) * layers,
        ("attention", "shared", *["routed"] * (units - 2)),
        *numbers,
        tuple(map(tuple, rng.random((units, 3)).tolist())),
    )
    return Costs(CHOICES, stored, tuple(10 * size for size in sizes)), features


@settings(deadline=None, max_examples=60)
@given(layers_of_units(), st.integers(100, 500), st.integers(0, 5), st.sets(st.integers(0, 1)), st.booleans())
def test_no_rule_ever_exceeds_a_budget(made, hundredths, seed, protected, each):
    costs, features = made
    budget = hundredths / 100
    for by in RULES:
        params = Allocation(budget, CHOICES, by, one_of_each=each, share=0.5, protected=tuple(sorted(protected)))
        bits = allocated(params, costs, features, seed)
        if bits is None:  # but for protection and one_of_each, everything fits wherever the fewest bits do
            assert protected or each or too_poor(costs, features, budget, by == "pmq")
            continue
        assert costs.average(bits) <= budget
        assert set(bits) <= set(CHOICES)
        for unit, expert in enumerate(features.expert_U):
            assert expert not in protected or bits[unit] == 3
        assert bits == allocate(params, costs, features, seed)


def allocated(params, costs, features, seed):
    """Return the allocation, or None where it is refused in a sentence."""
    try:
        return allocate(params, costs, features, seed)
    except ValueError as refused:
        return None if str(refused).endswith(".") else pytest.fail(str(refused))


def too_poor(costs, features, budget, by_layer_alone):
    layers = sorted(set(features.layer_U)) if by_layer_alone else [None]
    parts = [[u for u, own in enumerate(features.layer_U) if layer in (None, own)] for layer in layers]
    return any(
        sum(costs.stored_UB[u][0] for u in part) > budget * sum(costs.weights_U[u] for u in part) * (1 - 1e-12)
        for part in parts
    )


def test_every_name_of_the_parameter_has_a_rule():
    assert set(RULES) == set(typing.get_args(By))
    assert build_params(Allocation, {"by": "greedy", "bits": [2, 4]}, "x") == Allocation(bits=(2, 4), by="greedy")


def test_promotion_spends_all_that_the_budget_pays():
    costs = equal_costs(4)
    assert promote([2, 0, 1, 3])(costs, 800 + 199) == (2, 2, 3, 2)
    assert promote([2, 0, 1, 3])(costs, 800 + 200) == (3, 2, 3, 2)
    assert promote([2])(costs, 1200) == (3, 3, 3, 3)
    assert promote([3, 1])(Costs((2, 3, 4), ((200, 300, 400),) * 4, (100,) * 4), 1100) == (2, 3, 2, 4)


def test_a_unit_too_large_for_the_rest_is_passed_over():
    costs = Costs((2, 4), ((2000, 4000), (20, 40)), (1000, 10))
    assert promote([0, 1])(costs, 2020 + 20) == (2, 4)


def test_orders():
    assert most_first([1.0, 3.0, 3.0, 2.0]) == [1, 2, 3, 0]
    assert least_first([0.9, 0.1, 0.1]) == [1, 2, 0]
    assert layers_first([5, 5, 2, 9, 2], 2) == [2, 4, 0, 1]
    assert layers_first([5, 5, 2, 9, 2], 2, last=True) == [3, 0, 1]
    assert kind_first(["routed", "shared", "attention", "shared"], "shared") == [1, 3, 0, 2]
    assert sorted(shuffled(20, 1)) == list(range(20)) != shuffled(20, 1)
    assert shuffled(20, 1) == shuffled(20, 1) != shuffled(20, 2)
    assert by_layer((1, 2, 3, 4), (7, 3, 7, 3)) == ((2, 4), (1, 3))


def test_protected_experts_get_the_widest_choice_and_the_others_share_the_rest():
    costs = equal_costs(4)
    rule = protect([1], lambda others: promote(list(range(len(others)))))
    assert rule(costs, 700) == (2, 3, 1, 1)
    assert protect(range(4), lambda others: uniform)(costs, 1200) == (3, 3, 3, 3)
    with pytest.raises(ValueError, match=r"protected experts at 3 bits leave the others less than 1 bits; protect"):
        rule(costs, 599)
    with pytest.raises(ValueError, match=r"protected experts"):
        protect(range(4), lambda others: uniform)(costs, 1199)


# --- PMQ -------------------------------------------------------------------------------------------------------------

seeds = st.integers(0, 2**32 - 1).map(np.random.default_rng)
errors = st.one_of(
    st.lists(st.tuples(*[st.floats(0, 10)] * 3), min_size=8, max_size=8),
    seeds.map(lambda rng: rng.exponential(size=(8, 3)).tolist()),
)
counts = st.lists(st.integers(0, 50), min_size=8, max_size=8)
sizes = st.lists(st.integers(1, 4), min_size=8, max_size=8)

ALL = np.array(list(itertools.product(range(3), repeat=8)))
"""Every allocation of three choices to eight experts."""


def unequal(sizes, overhead):
    stored = tuple(tuple(8 * size * bits + overhead for bits in CHOICES) for size in sizes)
    return Costs(CHOICES, stored, tuple(8 * size for size in sizes))


def value_of(cost_EB, bits):
    return sum(cost_EB[expert, CHOICES.index(b)] for expert, b in enumerate(bits))


def brute_force(cost_EB, costs, allowed, each):
    stored_A = np.asarray(costs.stored_UB)[np.arange(8), ALL].sum(axis=1)
    fits_A = stored_A <= allowed
    if each:
        fits_A &= (ALL == 2).any(axis=1) & (ALL == 1).any(axis=1)
    return cost_EB[np.arange(8), ALL].sum(axis=1)[fits_A].min() if fits_A.any() else None


@settings(deadline=None, max_examples=80)
@given(errors, counts, counts, sizes, st.integers(0, 9), st.floats(0, 1), st.booleans(), st.sampled_from([1.0, 2.0]))
def test_pmq_is_the_optimum_of_all_allocations(error, count, share, size, overhead, rich, each, gamma):
    costs = unequal(size, overhead)
    cost_EB = objective(error, count, share, gamma=gamma)
    least, most = (costs.total([bits] * 8) for bits in (1, 3))
    allowed = int(least + rich * (most - least))
    best = brute_force(cost_EB, costs, allowed, each)
    if best is None:
        with pytest.raises(ValueError, match="raise the budget"):
            pmq(cost_EB, each)(costs, allowed)
        return
    bits = pmq(cost_EB, each)(costs, allowed)
    assert costs.total(bits) <= allowed
    assert not each or {2, 3} <= set(bits)
    assert value_of(cost_EB, bits) == pytest.approx(best, rel=1e-9, abs=1e-9 * max(cost_EB.max(), 1e-300))


@settings(deadline=None, max_examples=25)
@given(errors, counts, st.integers(8, 24), st.integers(0, 99))
def test_no_heuristic_beats_pmq_at_its_budget(error, count, total, seed):
    costs, allowed = equal_costs(8), 100 * total
    cost_EB = objective(error, count, count)
    best = {each: value_of(cost_EB, pmq(cost_EB, each)(costs, allowed)) for each in {False, total >= 11}}
    orders = [shuffled(8, seed), most_first(count), most_first([row[0] for row in error]), list(range(8))]
    for rule in (uniform, greedy(error), greedy(cost_EB.tolist()), *(promote(order) for order in orders)):
        bits = rule(costs, allowed)
        for each, least in best.items():  # with one_of_each, against those that keep it, too
            assert (each and not {2, 3} <= set(bits)) or least <= value_of(cost_EB, bits) + 1e-9 * cost_EB.max()


@settings(deadline=None, max_examples=40)
@given(errors, st.integers(8, 24))
def test_greedy_is_the_optimum_where_errors_fall_convexly(steps, total):
    # two falling steps, the larger one first, make three convex errors
    error = np.array([[sum(pair), min(pair), 0.0] for pair in ((a, b) for a, b, _ in steps)])
    costs = equal_costs(8)
    bits = greedy(error.tolist())(costs, 100 * total)
    best = brute_force(error, costs, 100 * total, each=False)
    assert value_of(error, bits) == pytest.approx(best, rel=1e-12, abs=1e-12)


def test_greedy_skips_a_choice_where_the_step_beyond_is_better_and_stops_where_nothing_is_gained():
    costs = equal_costs(2)
    assert greedy([(9.0, 8.9, 0.0), (5.0, 4.0, 3.0)])(costs, 400) == (3, 1)
    assert greedy([(9.0, 9.0, 9.5), (1.0, 1.0, 1.0)])(costs, 600) == (1, 1)
    assert greedy([(9.0, 8.9, 0.0), (5.0, 4.0, 3.0)])(costs, 300) == (1, 2)


def test_the_objective_has_the_exponents_of_the_paper_and_of_the_code():
    error, count, share = [[4.0, 1.0], [2.0, 0.5]], [3, 1], [1.0, 4.0]
    paper = objective(error, count, share)
    assert paper[0] == pytest.approx([0.75 * 0.2**1.5 * 16, 0.75 * 0.2**1.5])
    assert paper[1] == pytest.approx([0.25 * 0.8**1.5 * 4, 0.25 * 0.8**1.5 * 0.25])
    assert objective(error, count, share, gamma=1.0)[1] == pytest.approx([0.25 * 0.8**1.5 * 2, 0.25 * 0.8**1.5 * 0.5])


def test_pmq_says_what_is_wrong():
    cost_EB = np.ones((1, 3))
    with pytest.raises(ValueError, match=r"one expert at 2 bits and one expert at 3 bits; raise the budget\.$"):
        pmq(cost_EB)(equal_costs(1), 300)
    with pytest.raises(ValueError, match=r"objective is \(1, 3\) for 2 experts"):
        pmq(cost_EB)(equal_costs(2), 300)
    with pytest.raises(ValueError, match="of the same experts"):
        objective([[1.0, 2.0]], [1, 2], [1.0, 2.0])
    with pytest.raises(ValueError, match="finite and not negative"):
        objective([[1.0, math.nan]], [1], [1.0])
    with pytest.raises(ValueError, match="wants two choices"):
        pmq(np.ones((2, 1)))(Costs((2,), ((4,), (4,)), (2, 2)), 8)


def test_without_scipy_pmq_names_what_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(MoebenchError, match=r"needs scipy; run pip install 'moebench\[quantization\]'\.$"):
        pmq(np.ones((2, 3)))(equal_costs(2), 600)


# --- from parameters -------------------------------------------------------------------------------------------------


def test_pmq_spends_the_budget_of_each_layer_in_that_layer():
    error = ((9.0, 8.0, 0.0), (8.0, 7.9, 0.0), (0.3, 0.2, 0.0), (0.1, 0.01, 0.0))
    features = Features((0, 0, 1, 1), (0, 1, 0, 1), None, (1,) * 4, (1.0,) * 4, None, None, error)
    params = Allocation(2.0, CHOICES, "pmq", one_of_each=False)
    assert by_layer(allocate(params, equal_costs(4), features), features.layer_U) == ((3, 1), (3, 1))
    every = allocate(Allocation(2.0, CHOICES, "greedy"), equal_costs(4), features)
    assert by_layer(every, features.layer_U) == ((3, 3), (1, 1))


@pytest.mark.parametrize(
    ("by", "raised"),
    [("first", 0), ("last", 3), ("frequency", 1), ("shared", 2), ("attention", 3), ("outlier", 1), ("cosine", 0)],
)
def test_each_rule_raises_first_what_it_is_named_after(by, raised):
    features = Features(
        (0, 1, 1, 2),
        (0, 0, -1, -1),
        ("routed", "routed", "shared", "attention"),
        count_U=(3, 9, 4, 5),
        outlier_U=(1.0, 4.0, 2.0, 3.0),
        cosine_U=(0.2, 0.5, 0.5, 0.9),
    )
    costs = Costs((2, 4), ((200, 400),) * 4, (100,) * 4)
    bits = allocate(Allocation(2.5, (2, 4), by), costs, features)
    assert [unit for unit in range(4) if bits[unit] == 4] == [raised]


def test_exponents_and_one_of_each_reach_the_program():
    error = ((3.0, 2.0, 0.0), (1.9, 0.9, 0.0))
    features = Features((0, 0), (0, 1), None, (1, 1), (1.0, 1.0), error_UB=error)
    free = Allocation(2.0, CHOICES, one_of_each=False)
    assert allocate(free, equal_costs(2), features) == (3, 1)  # 1.9 squared is less than 2 squared and 0.9 squared
    skewed = Features((0, 0), (0, 1), None, (1, 9), (1.0, 1.0), error_UB=error)
    assert allocate(free, equal_costs(2), skewed) == (1, 3)
    assert allocate(Allocation(2.0, CHOICES, alpha=0.0, one_of_each=False), equal_costs(2), skewed) == (3, 1)
    shared = Features((0, 0), (0, 1), None, (1, 1), (1.0, 9.0), error_UB=error)
    assert allocate(free, equal_costs(2), shared) == (1, 3)
    assert allocate(Allocation(2.0, CHOICES, beta=0.0, one_of_each=False), equal_costs(2), shared) == (3, 1)
    middle = Features((0, 0), (0, 1), None, (1, 1), (1.0, 1.0), error_UB=((2.0, 0.9, 0.0), (1.5, 0.8, 0.0)))
    assert allocate(free, equal_costs(2), middle) == (2, 2)  # 0.81 + 0.64 < 2.25
    linear = Allocation(2.0, CHOICES, gamma=1.0, one_of_each=False)
    assert allocate(linear, equal_costs(2), middle) == (3, 1)  # 0.9 + 0.8 > 1.5
    assert set(allocate(Allocation(3.0, CHOICES), equal_costs(2), middle)) == {2, 3}
    assert allocate(Allocation(3.0, CHOICES, one_of_each=False), equal_costs(2), middle) == (3, 3)


def test_a_share_of_the_units_is_promoted():
    features = Features((0,) * 4, tuple(range(4)), outlier_U=(1.0, 4.0, 2.0, 3.0))
    costs = Costs((2, 4), ((200, 400),) * 4, (100,) * 4)
    assert allocate(Allocation(3.5, (2, 4), "outlier", share=0.25), costs, features) == (2, 4, 2, 2)
    assert allocate(Allocation(3.5, (2, 4), "outlier"), costs, features) == (2, 4, 4, 4)
    with pytest.raises(ValueError, match="'frequency' needs count_U, which was not measured"):
        allocate(Allocation(3.5, (2, 4), "frequency"), costs, features)
    with pytest.raises(ValueError, match=r"protected expert 9 does not exist; name ids below 4\.$"):
        allocate(Allocation(3.5, (2, 4), "outlier", protected=(9,)), costs, features)
    with pytest.raises(ValueError, match="make them for the same"):
        allocate(Allocation(3.5, (2, 3), "outlier"), costs, features)


@pytest.mark.parametrize("by", ["uniform", "random", "frequency", "outlier", "greedy", "pmq"])
def test_from_a_layer_to_packed_bytes_within_the_budget(by):
    store, router, x_TH = make_store(), make_router(), randn(T, H)
    owners = list(store.ffn_ids)
    schemes = {bits: Scheme("rtn", float(bits), None, False) for bits in (2, 4, 8)}
    made = calibrate(store, router, x_TH)
    error_EB = sensitivities(store, router, x_TH, lambda w, bits: quantize(w, schemes[bits]).dequantize(), (2, 4, 8))
    features = Features(
        (0,) * 4,
        store.ffn_ids,
        count_U=tuple(made.counts_E[owners].tolist()),
        share_U=tuple(made.share_E[owners].tolist()),
        outlier_U=expert_outlier_scores(store),
        error_UB=tuple(map(tuple, error_EB.tolist())),
    )
    costs = Costs.of(list(schemes.values()), [[(2 * F, H), (H, F)]] * 4)
    bits = allocate(Allocation(9.5, (2, 4, 8), by), costs, features)
    packed = [quantize(w[slot], schemes[b]) for slot, b in enumerate(bits) for w in (store.gate_up, store.down)]
    stored = 8 * sum(weight.nbytes for weight in packed)
    assert stored == costs.total(bits)
    assert stored <= 9.5 * sum(costs.weights_U)
    assert len(set(bits)) == 1 if by == "uniform" else len(set(bits)) > 1


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Allocation(0), "must be positive"),
        (lambda: Allocation(bits=(3, 2)), "must be rising"),
        (lambda: Allocation(share=1.5), r"must lie in \[0, 1\]"),
        (lambda: Allocation(layers=0), "at least 1"),
        (lambda: Allocation(gamma=-1.0), "must not be negative"),
        (lambda: Allocation(protected=(-1,)), "from 0 on"),
        (lambda: CosinePredictor(held_out=1.0), r"in \(0, 1\)"),
        (lambda: Costs((2, 1), ((1, 2),), (1,)), "sort them"),
        (lambda: Costs((1, 2), ((2, 2),), (1,)), "must rise with the choices"),
        (lambda: Costs((1, 2), (), ()), "at least one unit"),
        (lambda: equal_costs(2, overhead=50).allowed(1.49), r"1 bits with their scales take 1\.5; raise the budget"),
        (lambda: equal_costs(2).allowed(math.nan), "give one such as 2.5"),
        (lambda: stored_bits(Scheme("rtn", 2.0, 5, True), [(2, 12)]), "does not divide the input width 12"),
        (lambda: layers_first([0, 1], 3), "between 1 and the 2 layers"),
        (lambda: kind_first(["routed"], "shared"), "no unit is of kind 'shared'"),
        (lambda: protect([7], lambda others: uniform)(equal_costs(2), 600), r"must lie within 0\.\.1"),
        (lambda: Features((0, 0), (0,)), "expert_U has 1 entries for 2 units"),
        (lambda: uniform(equal_costs(2), 199), "less than 1 bits for all"),
    ],
)
def test_refusals_are_sentences(make, says):
    with pytest.raises(ValueError, match=says):
        make()


# --- calibration -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [None, Sparsity({"input": SiteRule(0.5), "hidden": SiteRule(0.2)})])
def test_calibration_is_the_sum_over_tokens_and_experts(sparsity):
    store, router, x_TH = make_store(sparsity), make_router(), randn(T, H)
    made = calibrate(store, router, x_TH)
    routing = router(x_TH, Context())
    for slot, expert in enumerate(store.ffn_ids):
        entries = [n for n in range(len(routing.token_N)) if routing.expert_N[n] == expert]
        read = [x_TH[routing.token_N[n]] for n in entries]
        read = read if sparsity is None else [sparsity.apply("input", row) for row in read]
        hidden = list(ffn_hidden(torch.stack(read), store.gate_up[slot], "silu"))
        hidden = hidden if sparsity is None else [sparsity.apply("hidden", row) for row in hidden]
        for stats, rows in ((made.gate_up[slot], read), (made.down[slot], hidden)):
            moment = sum(torch.outer(row.double(), row.double()) for row in rows)
            torch.testing.assert_close(stats.second_moment_II, moment, rtol=1e-12, atol=1e-12)
            assert torch.equal(stats.absmax_I, torch.stack(rows).abs().amax(0))
            torch.testing.assert_close(stats.mean_abs_I, sum(row.abs().double() for row in rows).float() / len(rows))
            assert stats.tokens == len(rows) == made.counts_E[expert]
            assert stats.weight == pytest.approx(sum(routing.weight_N[n].item() for n in entries), rel=1e-6)


def test_shares_are_of_the_weights_before_they_are_renormalised():
    store, x_TH = make_store(), randn(T, H)
    made = calibrate(store, make_router(), x_TH)
    probs_TE = (x_TH @ randn(len(KINDS), H, seed=3).T).softmax(-1).double()
    top = probs_TE.topk(K).indices
    kept_TE = torch.zeros_like(probs_TE).scatter(1, top, probs_TE.gather(1, top))
    torch.testing.assert_close(made.share_E, kept_TE.sum(0) / kept_TE.sum(), rtol=1e-6, atol=0)
    used_TE = kept_TE / kept_TE.sum(1, keepdim=True)
    torch.testing.assert_close(made.used_E, used_TE.sum(0), rtol=1e-6, atol=0)
    assert not torch.allclose(made.share_E, made.used_E / made.used_E.sum())
    assert made.counts_E.sum() == T * K


def test_an_expert_without_tokens_has_statistics_of_zeros():
    routing = Routing.topk(torch.tensor([[0], [0]]), torch.ones(2, 1), len(KINDS))
    made = calibrate_routed(make_store(), [(routing, randn(2, H))])
    for stats, width in ((made.gate_up[3], H), (made.down[3], F)):
        assert (stats.tokens, stats.weight) == (0, 0.0)
        assert torch.equal(stats.second_moment_II, torch.zeros(width, width, dtype=torch.float64))
        assert torch.equal(stats.absmax_I, torch.zeros(width))
        assert torch.equal(stats.mean_abs_I, torch.zeros(width))


def test_calibration_refuses_what_has_no_dense_ffn():
    quantized = coded(Int8())(make_store(), None)
    with pytest.raises(MoebenchError, match="quantized experts cannot be calibrated"):
        calibrate(quantized, make_router(), randn(T, H))
    attentions = ExpertStore(randn(1, 3 * H, H), randn(1, H, H), ("sequence",), heads=2)
    routing = Routing.topk(torch.zeros(T, 1, dtype=torch.long), torch.ones(T, 1), 1)
    with pytest.raises(MoebenchError, match="kind 'sequence' cannot be calibrated"):
        calibrate_routed(attentions, [(routing, randn(T, H))])


# --- balanced sampling -----------------------------------------------------------------------------------------------

ids = st.lists(st.lists(st.integers(0, 4), min_size=2, max_size=2, unique=True), min_size=1, max_size=30)


@settings(deadline=None, max_examples=80)
@given(ids, ids, st.sampled_from([0.25, 0.5, 1.0, 2.0]), st.integers(0, 9))
def test_every_expert_gets_its_share_or_all_candidates_of_its_own(base, more, ratio, seed):
    # id 4 is an empty slot of a layer of four experts
    base_TK, more_CK = torch.tensor(base), torch.tensor(more)
    sample = draw_balanced(base_TK, more_CK, 4, ratio, seed)
    again = draw_balanced(base_TK, more_CK, 4, ratio, seed)
    assert torch.equal(sample.token_S, again.token_S)
    drawn = sample.token_S.tolist()
    assert len(set(drawn)) == len(drawn)
    own = [sum(row.count(expert) for row in base) for expert in range(4)]
    assert sample.wanted == math.ceil(ratio * sum(own) / 4)
    for expert in range(4):
        starved = own[expert] < sample.wanted
        assert bool(sample.starved_E[expert]) == starved
        extra = sum(expert in more[token] for token in drawn)
        assert sample.counts_E[expert] == own[expert] + (extra if starved else 0)
        available = own[expert] + sum(expert in row for row in more)
        assert (expert in sample.short) == (available < sample.wanted)
        if expert in sample.short:
            assert sample.counts_E[expert] == available
        else:
            assert sample.counts_E[expert] >= sample.wanted
    assert all(any(sample.starved_E[e] for e in more[token] if e < 4) for token in drawn)
    assert bool(sample.reason) == bool(sample.short)


def test_seeds_draw_other_tokens_and_no_more_than_are_wanted():
    base, more = torch.zeros(20, 1, dtype=torch.long), torch.ones(100, 1, dtype=torch.long)
    one, other = (draw_balanced(base, more, 2, 0.5, seed) for seed in (1, 2))
    assert one.wanted == len(one.token_S) == len(other.token_S) == 5
    assert set(one.token_S.tolist()) != set(other.token_S.tolist())


def test_a_share_that_cannot_be_reached_is_said():
    sample = draw_balanced(torch.tensor([[0], [0]]), torch.tensor([[1]]), 3, 1.0)
    assert sample.short == (2,)
    assert sample.reason == (
        "1 of 3 experts have fewer than 1 calibration tokens, all candidates of theirs included: 2; "
        "give more candidates."
    )
    with pytest.raises(ValueError, match="ratio=0 must be a positive number"):
        draw_balanced(torch.tensor([[0]]), torch.tensor([[1]]), 3, 0.0)


def test_extra_tokens_reach_the_starved_expert_alone_and_leave_the_counts_alone():
    store, x_TH, more_CH = make_store(), randn(4, H), randn(6, H, seed=9)
    base = Routing.topk(torch.tensor([[0, 2]] * 4), torch.full((4, 2), 0.5), len(KINDS))
    more = Routing.topk(torch.tensor([[0, 3]] * 6), torch.full((6, 2), 0.25), len(KINDS))
    sample = draw_balanced(base.padded()[0], more.padded()[0], len(KINDS), 1.0, seed=4)
    assert sample.wanted == 2
    extra = extra_traffic(sample, more)
    assert set(extra.expert_N.tolist()) == {3}
    assert sorted(extra.token_N.tolist()) == sorted(sample.token_S.tolist())
    plain = calibrate_routed(store, [(base, x_TH)])
    made = calibrate_routed(store, [(base, x_TH), (extra, more_CH)])
    assert torch.equal(made.counts_E, plain.counts_E)
    assert torch.equal(made.share_E, plain.share_E)
    assert [stats.tokens for stats in made.gate_up] == [4, 4, 2, 0]
    rows = more_CH[extra.token_N].double()
    torch.testing.assert_close(made.gate_up[2].second_moment_II, rows.T @ rows)
    assert made.gate_up[2].weight == 0.5
    assert torch.equal(made.gate_up[0].second_moment_II, plain.gate_up[0].second_moment_II)


# --- sensitivities and scores ----------------------------------------------------------------------------------------


def fake_encode(weight, bits):
    step = float(weight.abs().max()) / 2 ** (bits - 1)
    return (weight / step).round() * step


@pytest.mark.parametrize("sparsity", [None, Sparsity({"hidden": SiteRule(0.2)})])
def test_sensitivities_are_those_of_the_whole_layer_run_again(sparsity):
    store, x_TH = make_store(sparsity), randn(T, H).double()
    router = make_router()
    shared = SharedExpert(randn(4, H, seed=7), randn(H, 2, seed=8), gate_H=randn(H, seed=9))
    found = sensitivities(store, router, x_TH, fake_encode, CHOICES)
    layer = PreparedLayer(store, router, shared)
    with torch.no_grad():
        before = moe_forward(layer, x_TH)
        for slot, place in itertools.product(range(4), range(3)):
            gate_up, down = store.gate_up.double().clone(), store.down.double().clone()
            gate_up[slot] = fake_encode(gate_up[slot], CHOICES[place])
            down[slot] = fake_encode(down[slot], CHOICES[place])
            coded = ExpertStore(gate_up, down, KINDS, sparsity=sparsity)
            off = (moe_forward(PreparedLayer(coded, router, shared), x_TH) - before).norm()
            assert float(found[slot, place]) == pytest.approx(float(off), rel=1e-10)
    assert bool((found > 0).all())
    assert found.shape == (4, 3)


def test_an_expert_without_tokens_is_not_sensitive():
    def none_but(weight, bits):
        return weight * 0

    router = Pipeline(Linear(torch.eye(len(KINDS), H)), TopK(1), Softmax())
    found = sensitivities(make_store(), router, torch.eye(H)[:1], none_but, (2,))
    assert found[0, 0] > 0
    assert torch.equal(found[1:], torch.zeros(3, 1, dtype=torch.float64))


def test_outlier_score_by_hand():
    weight = torch.tensor([[1.0, 0.0, -3.0], [1.0, -6.0, 1.0], [1.0, 0.0, 2.0]])
    # columns: max / mean = 1 / 1, 6 / 2, 3 / 2
    assert outlier_score(weight) == 3.0
    assert outlier_score(torch.zeros(3, 3)) == 0.0


def test_an_expert_scores_as_its_worst_linear_map():
    # gate and up apart: the 3 of up would be 3 / 1.5 = 2 in one matrix of four rows, 3 / 2 alone
    gate_up = torch.tensor([[[1.0], [1.0], [3.0], [1.0]]])
    down = torch.tensor([[[1.0, 1.0]]])
    assert expert_outlier_scores(ExpertStore(gate_up, down, ("ffn",))) == (1.5,)
    assert expert_outlier_scores(ExpertStore(gate_up[:, :2], down, ("ffn",), gated=False)) == (1.0,)


def test_block_cosine_is_the_mean_over_tokens():
    x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    y = torch.tensor([[3.0, 0.0], [1.0, 1.0]])
    assert block_cosine(x, y) == pytest.approx((1 + 0.5**0.5) / 2)


def test_the_predictor_learns_what_a_block_does_and_is_the_same_again():
    x_TH = randn(600, H)
    turned = x_TH + 2 * torch.relu(x_TH @ randn(H, H, seed=5))
    cosine_T = token_cosines(x_TH, turned)
    params = CosinePredictor(width=32, lr=1e-2, epochs=20, batch=64)
    fitted, again = (fit_predictor(x_TH, cosine_T, params, seed=1) for _ in range(2))
    assert fitted.held_out_error < 0.5 * fitted.held_out_variance
    assert fitted.predictor.score(x_TH) == again.predictor.score(x_TH)
    assert fitted.predictor.score(x_TH) == pytest.approx(float(cosine_T.mean()), abs=0.1)
    noise_T = randn(600, seed=6).tanh()
    noise = fit_predictor(x_TH, noise_T, CosinePredictor(width=32, lr=1e-2, patience=2, batch=64), seed=1)
    assert noise.epochs < 100
    judged = torch.randperm(600, generator=torch.Generator().manual_seed(1))[:60]
    kept = (noise.predictor(x_TH[judged]) - noise_T[judged]).square().mean()
    assert noise.held_out_error == pytest.approx(kept.item(), rel=1e-5)  # the best epoch's, not the last one's


def test_the_predictor_refuses_what_it_cannot_learn_from():
    with pytest.raises(ValueError, match="1 tokens cannot be split"):
        fit_predictor(randn(1, H), torch.ones(1), CosinePredictor(), seed=0)
    with pytest.raises(ValueError, match="contain NaN"):
        fit_predictor(randn(9, H), torch.full((9,), math.nan), CosinePredictor(), seed=0)
