"""Figures of a Routing against values known by hand, brute force, and the laws that hold for any routing."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moebench.moe.capacity import CapacityRule, limit
from moebench.moe.router import Linear, One, Pipeline, Softmax, TopK
from moebench.moe.routers.moepp import NullTopK
from moebench.moe.routing import Context, Routing
from moebench.moe.routing_metrics.agreement import fluctuation, heaviest, hit_share
from moebench.moe.routing_metrics.chunks import chunk_bytes, chunk_experts, sparsity_metrics
from moebench.moe.routing_metrics.cost import counted_flops, expert_flops, parameters_of_kind, weights_per_token
from moebench.moe.routing_metrics.drops import drop_metrics
from moebench.moe.routing_metrics.labels import label_information
from moebench.moe.routing_metrics.prefetch import prefetch_metrics
from moebench.moe.routing_metrics.tokens import gradient_share, k_histogram, weight_metrics

relaxed = settings(deadline=None, max_examples=60)
TOKENS, EXPERTS = st.integers(1, 24), st.integers(1, 6)


def named(metrics):
    values = {metric.name: metric.value for metric in metrics}
    assert len(values) == len(metrics), "a name came twice"
    return values


def seeded(*size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def gate(*rows):
    """A Routing from the rows of a dense gate matrix."""
    return Routing.dense(torch.tensor(rows, dtype=torch.float64))


def top_k(tokens, experts, k, seed=0):
    """Independent tokens, k experts each."""
    weights_TK, indices_TK = seeded(tokens, experts, seed=seed).softmax(-1).topk(k)
    return Routing.topk(indices_TK, weights_TK, experts)


@st.composite
def routings(draw, tokens=TOKENS, experts=EXPERTS):
    """Any Routing: every pair is there or not, with any weight."""
    size = (draw(tokens), draw(experts))
    seed, density = draw(st.integers(0, 2**31)), draw(st.floats(0, 1))
    rng = torch.Generator().manual_seed(seed)
    mask_TE = torch.rand(size, generator=rng) < density
    return Routing.dense(torch.randn(size, generator=rng) * mask_TE)


@st.composite
def two_routings(draw):
    tokens, experts = draw(st.integers(1, 12)), draw(st.integers(1, 6))
    size = {"tokens": st.just(tokens), "experts": st.just(experts)}
    return draw(routings(**size)), draw(routings(**size))


# --- agreement -------------------------------------------------------------------------------------------------------


def test_fluctuation_by_hand():
    one = gate([0.6, 0.4, 0], [0.6, 0.4, 0], [0, 0, 1], [0, 0, 0])
    other = gate([0.4, 0.6, 0], [0.6, 0, 0.4], [0, 1, 0], [0, 0, 0])
    assert named(fluctuation(one, other)) == {
        "fluctuation_top1": 0.5,  # the first and the third token
        "fluctuation_set": 0.5,  # the second and the third
        "jaccard_mean": pytest.approx((1 + 1 / 3 + 0 + 1) / 4),
    }


@relaxed
@given(two_routings())
def test_fluctuation_is_symmetric_and_nothing_against_itself(pair):
    one, other = pair
    assert named(fluctuation(one, other)) == named(fluctuation(other, one))
    assert named(fluctuation(one, one)) == {"fluctuation_top1": 0, "fluctuation_set": 0, "jaccard_mean": 1}


@relaxed
@given(two_routings())
def test_jaccard_by_sets(pair):
    sets = [[set(), set()] for _ in range(pair[0].num_tokens)]
    for side, routing in enumerate(pair):
        for token, expert in zip(routing.token_N.tolist(), routing.expert_N.tolist(), strict=True):
            sets[token][side].add(expert)
    jaccard = [len(a & b) / len(a | b) if a | b else 1 for a, b in sets]
    values = named(fluctuation(*pair))
    assert values["jaccard_mean"] == pytest.approx(sum(jaccard) / len(sets))
    assert values["fluctuation_set"] == pytest.approx(sum(a != b for a, b in sets) / len(sets))


def test_the_heaviest_expert_is_the_lowest_among_equals_and_none_where_there_is_none():
    routing = gate([0, 0.5, 0.5], [-2, 0, -1], [0, 0, 0])
    assert heaviest(routing).tolist() == [1, 2, 3]
    order_N = torch.tensor([1, 0, 3, 2])
    shuffled = Routing(routing.token_N[order_N], routing.expert_N[order_N], routing.weight_N[order_N], routing.shape)
    assert heaviest(shuffled).tolist() == [1, 2, 3]


def test_routings_of_other_shapes_are_not_compared():
    with pytest.raises(ValueError, match="give two of one layer"):
        fluctuation(gate([1, 0]), gate([1, 0, 0]))


def test_hits_are_shares_of_what_came():
    assert hit_share(gate([1, 1, 0], [0, 0, 1]), gate([1, 0, 0], [1, 0, 1])) == pytest.approx(2 / 3)
    assert hit_share(gate([1, 1]), gate([0, 0])) is None


# --- chunks ----------------------------------------------------------------------------------------------------------


def segments_of(ids):
    return Context(segment_T=torch.tensor(ids))


def brute_chunks(routing, length, segments):
    """Distinct experts per chunk, from sets."""
    places = {}
    for token, segment in enumerate(segments):
        places.setdefault(segment, []).append(token)
    used = [set() for _ in segments]
    for token, expert in zip(routing.token_N.tolist(), routing.expert_N.tolist(), strict=True):
        used[token].add(expert)
    found = []
    for segment in sorted(places):
        tokens = places[segment]
        whole = len(tokens) // length * length
        found += [len(set().union(*(used[t] for t in tokens[i : i + length]))) for i in range(0, whole, length)]
    return found


@relaxed
@given(routings(), st.integers(1, 9), st.data())
def test_chunks_by_sets(routing, length, data):
    tokens = routing.num_tokens
    segments = data.draw(st.lists(st.integers(-2, 2), min_size=tokens, max_size=tokens))
    distinct_C = chunk_experts(routing, length, segments_of(segments))
    assert distinct_C.tolist() == brute_chunks(routing, length, segments)
    assert chunk_experts(routing, length).tolist() == brute_chunks(routing, length, [0] * tokens)


def test_chunks_cross_no_segment_and_tails_are_left_out():
    routing = gate([1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 0], [1, 0, 0])
    assert chunk_experts(routing, 2).tolist() == [2, 2]
    assert chunk_experts(routing, 2, segments_of([0, 0, 0, 1, 1])).tolist() == [2, 1]
    assert chunk_experts(routing, 2, segments_of([0, 1, 0, 1, 0])).tolist() == [2, 2]
    assert chunk_experts(routing, 6).tolist() == []
    with pytest.raises(ValueError, match="length of at least 1"):
        chunk_experts(routing, 0)


@relaxed
@given(routings(tokens=st.sampled_from([16, 32, 48])))
def test_longer_chunks_are_less_sparse(routing):
    values = named(sparsity_metrics(routing))
    order = [values[name] for name in ("cls_16", "cls_8", "cls_4", "cls_2", "tls")]
    assert all(a <= b + 1e-12 for a, b in itertools.pairwise(order))
    assert 0 <= order[0] <= order[-1] <= 1


def test_independent_tokens_have_the_power_of_tls():
    mask_TE = torch.rand(8192, 48, generator=torch.Generator().manual_seed(0)) < 0.5
    values = named(sparsity_metrics(Routing.dense(mask_TE.double())))
    assert values["tls"] == pytest.approx(0.5, abs=0.005)
    for length in (2, 4, 8):
        assert values[f"cls_{length}"] == pytest.approx(values["tls"] ** length, abs=0.004)


def test_padding_is_not_sparsity():
    routing = Routing.topk(torch.tensor([[0, 1], [1, 2], [9, 9], [9, 9]]), torch.ones(4, 2), 4)
    ctx = Context(valid_T=torch.tensor([True, True, False, False]))
    figures = {metric.name: metric.value for metric in sparsity_metrics(routing, (2,), ctx)}
    assert figures == {"tls": 0.5, "cls_2": 0.25}


def test_bytes_of_a_chunk_are_those_of_its_union():
    routing = top_k(64, 16, 2)
    sparsity, moved = named(sparsity_metrics(routing)), named(chunk_bytes(routing, 100.0))
    for length in (2, 4, 8, 16):
        assert moved[f"chunk_bytes_{length}"] == pytest.approx((1 - sparsity[f"cls_{length}"]) * 16 * 100)


def test_a_batch_shorter_than_a_chunk_has_no_figure():
    values = named(sparsity_metrics(top_k(3, 4, 1)))
    assert values["cls_2"] is not None
    assert values["cls_4"] is None


# --- drops -----------------------------------------------------------------------------------------------------------


def skewed(tokens=4096, experts=16):
    """Top-1 of a linear router at random, as Switch begins."""
    logits_TE = seeded(tokens, 64, seed=1) @ (seeded(64, experts, seed=2) / 8)
    probs_TE = logits_TE.softmax(-1)
    best = probs_TE.max(-1, keepdim=True)
    return Routing.topk(best.indices, best.values, experts)


def test_drops_by_position_hit_the_end_of_the_batch_and_random_ones_do_not():
    routing, kinds = skewed(), ("ffn",) * 16
    metrics, by_half = drop_metrics(routing, limit(routing, kinds, CapacityRule(factor=1.0)), parts=2)
    rate = named(metrics)["drop_rate"]
    assert by_half.values[0] == 0
    assert by_half.values[1] == pytest.approx(2 * rate)
    ctx = Context(rng=torch.Generator().manual_seed(3))
    kept = limit(routing, kinds, CapacityRule(factor=1.0, policy="random"), ctx)
    metrics, by_half = drop_metrics(routing, kept, parts=2)
    assert named(metrics)["drop_rate"] == rate  # as many, of other tokens
    assert by_half.values[0] == pytest.approx(by_half.values[1], abs=0.03)


def test_deciles_rates_and_unserved_tokens_by_hand():
    routing = gate(*([1, 1] for _ in range(20)))
    dropped_N = (routing.token_N >= 18) & (routing.expert_N == 0) | (routing.token_N == 19)
    metrics, series = drop_metrics(routing, routing.keep(~dropped_N))
    assert named(metrics) == {"drop_rate": 3 / 40, "unserved_share": 1 / 20}
    assert series.values == (0,) * 9 + (0.75,)


def test_few_tokens_have_a_part_each_and_nothing_asked_is_nothing_dropped():
    metrics, series = drop_metrics(gate([1, 0], [0, 0]), gate([0, 0], [0, 0]))
    assert series.values == (1, 0)
    assert named(metrics) == {"drop_rate": 1, "unserved_share": 0.5}
    metrics, _ = drop_metrics(gate([0, 0]), gate([0, 0]))
    assert named(metrics) == {"drop_rate": None, "unserved_share": 0}


# --- tokens ----------------------------------------------------------------------------------------------------------


def test_slots_and_weights_by_hand():
    routing = gate([2, -1, 0], [0, 0, 0], [0.5, 0, 0], [0, 1, 0.5])
    assert k_histogram(routing).values == (1, 1, 2)
    sums = torch.tensor([1, 0, 0.5, 1.5], dtype=torch.float64)
    assert named(weight_metrics(routing)) == {
        "weight_sum_std": pytest.approx(float(sums.std(correction=0))),
        "weight_sum_min": 0,
        "weight_sum_max": 1.5,
        "weight_negative_share": 1 / 5,
    }


@relaxed
@given(routings())
def test_the_histogram_counts_every_token_and_every_entry(routing):
    counts = k_histogram(routing).values
    assert sum(counts) == routing.num_tokens
    assert sum(k * count for k, count in enumerate(counts)) == len(routing.token_N)


def share(router, tokens=64, hidden=48):
    x_TH = seeded(tokens, hidden, seed=5).requires_grad_()
    routing = router(x_TH, Context())
    return gradient_share(routing, x_TH).value, routing


def pipeline(k, weighter, experts=8, hidden=48):
    return Pipeline(Linear(seeded(experts, hidden, seed=4) / hidden**0.5), TopK(k), weighter)


@pytest.mark.parametrize(
    ("k", "weighter", "expected"),
    [
        (1, Softmax(renormalize=True), 0),  # the weight is 1 whatever the score
        (1, Softmax(), 1),
        (2, Softmax(renormalize=True), 1),  # the sum is constant, the weights are not
        (2, One(), 0),
        (2, One(renormalize=True, scale=2.5), 0),
    ],
)
def test_constant_weights_carry_no_gradient(k, weighter, expected):
    """R28, as a share of tokens: none where the one weight of a token is made 1, or all its weights are."""
    assert share(pipeline(k, weighter))[0] == expected


def test_a_token_whose_other_choice_was_null_teaches_the_router_nothing():
    zero_E = torch.tensor([False] * 5 + [True] * 3)
    value, routing = share(NullTopK(Linear(seeded(8, 48, seed=4) / 7), 2, zero_E, 1.0))
    assert value == pytest.approx(float((routing.k_T >= 2).double().mean()))
    assert 0 < value < 1


def test_nothing_is_carried_where_the_input_takes_no_part():
    x_TH = seeded(4, 8).requires_grad_()
    weight_T1 = torch.ones(4, 1, requires_grad=True)
    assert gradient_share(Routing.topk(torch.zeros(4, 1, dtype=torch.int64), weight_T1, 2), x_TH).value == 0
    assert gradient_share(top_k(4, 2, 1), x_TH).value == 0
    assert gradient_share(Routing.dense(torch.zeros(0, 2)), x_TH[:0]).value is None


# --- cost ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("gated", "per_weight"), [(True, 6), (False, 4)])
def test_null_assignments_cost_nothing(gated, per_weight):
    kinds = ("ffn",) * 6 + ("zero",) * 2
    routing = top_k(256, 8, 3)
    true_share = float(routing.counts_E[:6].sum()) / (256 * 3)
    values = named(expert_flops(routing, kinds, 10, 20, gated))
    assert values["expert_flops_per_token"] == pytest.approx(true_share * 3 * per_weight * 10 * 20)
    assert values["expert_flops_share"] == pytest.approx(true_share * 3 / 6)


def test_weights_of_every_kind():
    cost = {kind: parameters_of_kind(kind, 10, 20, True) for kind in ("ffn", "zero", "copy", "constant", "gather")}
    assert cost == {"ffn": 600, "zero": 0, "copy": 0, "constant": 30, "gather": 600}
    assert (parameters_of_kind("gather", 10, 1, True), parameters_of_kind("gather", 10, 1, False)) == (30, 20)
    assert parameters_of_kind("sequence", 10, 20, True) is None


def test_a_kind_of_unknown_cost_matters_only_where_it_is_used():
    kinds = ("ffn", "sequence")
    assert named(expert_flops(gate([1, 0]), kinds, 10, 20, True))["expert_flops_per_token"] == 1200
    assert named(expert_flops(gate([1, 1]), kinds, 10, 20, True))["expert_flops_per_token"] is None


def test_weights_per_token_are_the_mean_over_all_tokens_of_all_routings():
    kinds = ("ffn", "ffn", "constant", "copy")
    one, three = gate([1, 1, 0, 1]), gate([1, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0])
    assert weights_per_token([one], kinds, 10, 20, True) == 2 * 600
    assert weights_per_token([three], kinds, 10, 20, False) == (400 + 30) / 3
    assert weights_per_token([one, three], kinds, 10, 20, True) == (3 * 600 + 30) / 4
    assert weights_per_token([], kinds, 10, 20, True) is None
    assert weights_per_token([gate([1, 1])], ("ffn", "sequence"), 10, 20, True) is None


def test_a_linear_router_has_two_flops_per_weight_and_token():
    router, x_TH = pipeline(2, Softmax()), seeded(64, 48)
    assert counted_flops(lambda: router(x_TH, Context())) == 2 * 64 * 48 * 8


# --- labels ----------------------------------------------------------------------------------------------------------


def single(experts_T, experts):
    indices_T1 = torch.as_tensor(experts_T)[:, None]
    return Routing.topk(indices_T1, torch.ones(indices_T1.shape), experts)


def test_experts_that_serve_one_label_know_all_of_it():
    label_T = torch.tensor([7, 7, -3, -3, -3, 7])
    routing = single([0, 1, 2, 2, 3, 0], 4)
    values = named(label_information(routing, label_T, "task"))
    assert values["information_task"] == pytest.approx(math.log(2))
    assert values["information_task_share"] == pytest.approx(1)


def test_one_expert_or_one_label_tells_nothing():
    label_T = torch.tensor([0, 1, 0, 1])
    assert named(label_information(single([2] * 4, 3), label_T, "x"))["information_x"] == 0
    one_label = named(label_information(single([0, 1, 2, 0], 3), torch.zeros(4, dtype=torch.int64), "x"))
    assert one_label == {"information_x": pytest.approx(0, abs=1e-12), "information_x_share": None}


def test_information_of_independent_labels_is_the_bias_of_counts():
    label_T = (seeded(20_000, seed=8) > 0).long()
    value = named(label_information(top_k(20_000, 16, 2), label_T, "x"))["information_x"]
    assert value == pytest.approx(15 * 1 / (2 * 40_000), rel=1.0)


@relaxed
@given(routings(), st.data())
def test_information_by_its_definition(routing, data):
    tokens = routing.num_tokens
    label_T = torch.tensor(data.draw(st.lists(st.integers(0, 2), min_size=tokens, max_size=tokens)))
    joint_LE = torch.zeros(3, routing.num_experts, dtype=torch.float64)
    for token, expert in zip(routing.token_N.tolist(), routing.expert_N.tolist(), strict=True):
        joint_LE[label_T[token], expert] += 1
    values = named(label_information(routing, label_T, "x"))
    if not len(routing.token_N):
        assert values == {"information_x": None, "information_x_share": None}
        return
    joint_LE /= joint_LE.sum()
    independent_LE = joint_LE.sum(1, keepdim=True) * joint_LE.sum(0)
    terms = torch.where(joint_LE > 0, joint_LE * (joint_LE / independent_LE.clamp(min=1e-300)).log(), 0.0)
    assert values["information_x"] == pytest.approx(float(terms.sum()), abs=1e-9)


def test_labels_must_be_those_of_the_tokens():
    with pytest.raises(ValueError, match="one for each token"):
        label_information(gate([1], [1]), torch.tensor([0]), "x")


# --- prefetch --------------------------------------------------------------------------------------------------------


def test_one_decision_for_all_layers_is_known_a_layer_earlier():
    routing = single(torch.arange(64) % 7, 7)
    values = named(prefetch_metrics(routing, routing))
    assert values["prefetch_transition"] == 1
    assert values["prefetch_popular"] == pytest.approx(1 / 7, abs=0.03)


def test_a_layer_that_follows_the_one_before_is_known_from_it():
    before = top_k(512, 8, 2)
    after = before.relabel(torch.tensor([3, 4, 5, 6, 7, 0, 1, 2]))
    values = named(prefetch_metrics(before, after))
    assert values["prefetch_transition"] > 0.95
    assert values["prefetch_popular"] < 0.4


def test_independent_layers_are_known_by_popularity_alone():
    values = named(prefetch_metrics(top_k(4096, 16, 2, seed=1), top_k(4096, 16, 2, seed=2)))
    assert values["prefetch_popular"] == pytest.approx(2 / 16, abs=0.02)
    assert values["prefetch_transition"] == pytest.approx(2 / 16, abs=0.02)


def test_a_budget_of_all_experts_finds_everything():
    before, after = top_k(64, 6, 1, seed=1), top_k(64, 9, 3, seed=2)
    assert named(prefetch_metrics(before, after, budget=9)) == {"prefetch_popular": 1, "prefetch_transition": 1}


def test_nothing_to_count_or_to_judge_gives_no_figure():
    nothing = gate(*([0, 0] for _ in range(4)))
    assert set(named(prefetch_metrics(nothing, nothing)).values()) == {None}
    assert set(named(prefetch_metrics(nothing, gate([1, 0], [1, 0], [0, 0], [0, 0]))).values()) == {None}
    values = named(prefetch_metrics(nothing, gate([1, 0], [1, 0], [1, 0], [0, 1])))
    assert values == {"prefetch_popular": 0.5, "prefetch_transition": 0.5}
    with pytest.raises(ValueError, match="the same tokens"):
        prefetch_metrics(gate([1]), gate([1], [1]))
