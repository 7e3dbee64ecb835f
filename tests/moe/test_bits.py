"""Bits per expert: PMQ is the optimum, and budgets hold, whatever the rule."""

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
    layers_drawn,
    layers_first,
    least_first,
    most_first,
    promote,
    protect,
    shuffled,
    uniform,
)
from moebench.moe.bits.budget import Costs, stored_bits
from moebench.moe.bits.calibration import calibrate
from moebench.moe.bits.params import Allocation, By, CosinePredictor
from moebench.moe.bits.pmq import objective, pmq
from moebench.moe.bits.scores import expert_outlier_scores
from moebench.moe.bits.sensitivity import sensitivities
from moebench.moe.codecs.rtn import round_to_nearest
from moebench.moe.experts import ExpertStore
from moebench.moe.router import Linear, Pipeline, Softmax, TopK

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
    packed = [round_to_nearest(randn(rows, 12), scheme) for rows in (5, 7)]
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
        pairs = tuple((0, expert) for expert in sorted(protected))
        params = Allocation(budget, CHOICES, by, one_of_each=each, share=0.5, protected=pairs)
        bits = allocated(params, costs, features, seed)
        if bits is None:  # but for protection and one_of_each, everything fits wherever the fewest bits do
            assert protected or each or too_poor(costs, features, budget, by == "pmq")
            continue
        assert costs.average(bits) <= budget
        assert set(bits) <= set(CHOICES)
        for unit, (layer, expert) in enumerate(zip(features.layer_U, features.expert_U, strict=True)):
            assert layer != 0 or expert not in protected or bits[unit] == 3
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
    assert sorted(layers_drawn([5, 5, 2, 9, 2], 3, 1)) == [0, 1, 2, 3, 4]
    assert {tuple(layers_drawn([5, 5, 2, 9], 1, seed)) for seed in range(20)} == {(0, 1), (2,), (3,)}
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
    assert allocate(Allocation(3.5, (2, 4), "outlier", share=0.49), costs, features).count(4) == 1, "at most"
    many = Features((0,) * 100, tuple(range(100)), outlier_U=tuple(map(float, range(100))))
    for share, count in ((0.29, 29), (0.57, 57), (0.299, 29), (0.0, 0)):  # 0.29 * 100 is below 29
        rule = Allocation(3.5, (2, 4), "outlier", share=share)
        assert allocate(rule, Costs((2, 4), ((200, 400),) * 100, (100,) * 100), many).count(4) == count
    assert allocate(Allocation(3.5, (2, 4), "outlier"), costs, features) == (2, 4, 4, 4)
    with pytest.raises(ValueError, match="'frequency' needs count_U, which was not measured"):
        allocate(Allocation(3.5, (2, 4), "frequency"), costs, features)
    with pytest.raises(ValueError, match=r"protected expert 9 of layer 0 is no unit of this budget; name ids below 4"):
        allocate(Allocation(3.5, (2, 4), "outlier", protected=((0, 9),)), costs, features)
    with pytest.raises(ValueError, match="make them for the same"):
        allocate(Allocation(3.5, (2, 3), "outlier"), costs, features)


@pytest.mark.parametrize("by", ["uniform", "random", "frequency", "outlier", "greedy", "pmq"])
def test_from_a_layer_to_packed_bytes_within_the_budget(by):
    store, router, x_TH = make_store(), make_router(), randn(T, H)
    owners = list(store.ffn_ids)
    schemes = {bits: Scheme("rtn", float(bits), None, False) for bits in (2, 4, 8)}
    made = calibrate(store, router, x_TH)
    error_EB = sensitivities(
        store, router, x_TH, lambda w, bits: round_to_nearest(w, schemes[bits]).dequantize(), (2, 4, 8)
    )
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
    packed = [round_to_nearest(w[slot], schemes[b]) for slot, b in enumerate(bits) for w in (store.gate_up, store.down)]
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
        (lambda: Allocation(protected=((0, -1),)), "from 0 on"),
        (lambda: Allocation(protected=((1,),)), "must be pairs"),
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
