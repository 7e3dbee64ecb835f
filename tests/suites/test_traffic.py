"""Traffic: what is promised of every forced routing, and what each kind promises."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moebench.contracts import MoebenchError
from moebench.suites.model_plugins import PRESETS, TRAFFIC, Bursty, Dead, Hotspot, Uniform, Zipf
from moebench.suites.traffic import DrawnTraffic, inclusion

FORCED = {d.name: d for d in TRAFFIC if d.params.forced}
sizes = st.tuples(st.integers(0, 70), st.integers(1, 24), st.integers(1, 24)).filter(lambda s: s[2] <= s[1])


def routing_of(name, tokens, experts, k, step=0, seed=0, **params):
    return FORCED[name].create(params).routing(tokens, experts, k, step, seed)


def possible(name, experts, k):
    try:
        FORCED[name].params_from().check(experts, k)
    except ValueError:
        return False
    return True


@settings(deadline=None, max_examples=40)
@given(name=st.sampled_from(sorted(FORCED)), size=sizes, step=st.integers(0, 9), seed=st.integers(0, 2**40))
def test_every_token_gets_k_distinct_experts_of_equal_weight(name, size, step, seed):
    tokens, experts, k = size
    assume(possible(name, experts, k))
    routing = routing_of(name, tokens, experts, k, step, seed)
    assert routing.shape == (tokens, experts)
    assert routing.k_T.tolist() == [k] * tokens
    assert len(set(zip(routing.token_N.tolist(), routing.expert_N.tolist(), strict=True))) == tokens * k
    assert set(routing.weight_N.tolist()) <= {torch.tensor(1 / k).item()}
    again = routing_of(name, tokens, experts, k, step, seed)
    assert torch.equal(routing.expert_N, again.expert_N)


@settings(deadline=None, max_examples=60)
@given(size=sizes, step=st.integers(0, 3), seed=st.integers(0, 2**40))
def test_balanced_counts_differ_by_at_most_one(size, step, seed):
    tokens, experts, k = size
    counts = routing_of("balanced", tokens, experts, k, step, seed).counts_E
    assert counts.sum() == tokens * k
    assert counts.max() - counts.min() <= 1


def test_balanced_uses_every_expert_at_the_size_that_once_left_half_idle():
    # sglang#37741: an override called balanced sent 256 experts, top-8, to every other rank only
    routing = routing_of("balanced", 512, 256, 8)
    assert routing.counts_E.tolist() == [16] * 256
    by_rank = routing.counts_E.reshape(16, 16).sum(1)
    assert by_rank.tolist() == [256] * 16


@pytest.mark.parametrize("name", sorted(FORCED))
def test_steps_and_seeds_differ(name):
    draws = [routing_of(name, 64, 16, 2, step, seed).expert_N for step, seed in itertools.product((0, 1, 2), (0, 1))]
    for a, b in itertools.combinations(draws, 2):
        assert not torch.equal(a, b)


@settings(deadline=None, max_examples=30)
@given(experts=st.integers(2, 40), fraction=st.floats(0.01, 0.9), seed=st.integers(0, 99))
def test_dead_experts_get_nothing(experts, fraction, seed):
    dead = max(1, round(fraction * experts))
    assume(dead < experts)
    traffic = DrawnTraffic(Dead(fraction=fraction))
    k = min(3, experts - dead)
    counts = traffic.routing(200, experts, k, 0, seed).counts_E
    assert counts[-dead:].sum() == 0
    assert traffic.requested(experts, k)[-dead:] == (0.0,) * dead


def test_more_slots_than_living_experts_are_refused():
    with pytest.raises(ValueError, match="k=7 must lie between 1 and the 6 experts"):
        routing_of("dead", 4, 8, 7)
    with pytest.raises(ValueError, match="leave none of 4"):
        DrawnTraffic(Hotspot(0.5, 4)).routing(4, 4, 1, 0, 0)


@pytest.mark.parametrize(
    ("params", "step"), [(Uniform(), 0), (Zipf(1.2), 0), (Hotspot(0.6, 2), 0), (Dead(0.5), 0), (Bursty(), 1)]
)
@pytest.mark.parametrize("k", [1, 3])
def test_realised_shares_meet_the_requested_ones(params, step, k):
    traffic, tokens, experts = DrawnTraffic(params), 20_000, 8
    realised = traffic.routing(tokens, experts, k, step, 7).counts_E / (tokens * k)
    requested = torch.tensor(traffic.requested(experts, k, step))
    assert requested.sum() == pytest.approx(1)
    # an expert's count is binomial with probability k * share: six standard deviations
    sigma = (k * requested * (1 - k * requested).clamp(min=0) / tokens).sqrt() / k
    assert ((realised - requested).abs() <= 6 * sigma + 1e-6).all()


def test_zipf_orders_the_experts():
    counts = routing_of("zipf", 50_000, 8, 2).counts_E.tolist()
    assert counts == sorted(counts, reverse=True)
    assert len(set(counts)) == 8


def test_distinct_draws_flatten_a_popularity():
    popularity = Zipf(1.0).popularity(8, 0)
    one, four = (DrawnTraffic(Zipf(1.0)).requested(8, k) for k in (1, 4))
    assert one == pytest.approx(popularity, abs=1e-9)
    assert max(four) < max(one)
    assert DrawnTraffic(Zipf(1.0)).requested(8, 8) == pytest.approx([1 / 8] * 8, abs=1e-9)


@settings(deadline=None, max_examples=20)
@given(weights=st.lists(st.floats(1e-3, 1.0), min_size=2, max_size=5), data=st.data())
def test_inclusion_is_the_sum_over_all_ordered_draws(weights, data):
    p = [w / sum(weights) for w in weights]
    k = data.draw(st.integers(1, len(p)))
    exact = [0.0] * len(p)
    for order in itertools.permutations(range(len(p)), k):
        chance, left = 1.0, 1.0
        for expert in order:
            chance *= p[expert] / left
            left -= p[expert]
        for expert in order:
            exact[expert] += chance
    assert inclusion(torch.tensor(p, dtype=torch.float64), k).tolist() == pytest.approx(exact, rel=1e-7)


def test_bursts_move_and_calm_is_uniform():
    bursty = Bursty(share=0.8, experts=2, period=3)
    assert bursty.popularity(8, 0) == bursty.popularity(8, 2) == (1 / 8,) * 8
    first, second = bursty.popularity(8, 3), bursty.popularity(8, 9)
    assert first[:2] == pytest.approx((0.4, 0.4))
    assert second[2:4] == pytest.approx((0.4, 0.4))


def test_an_empty_step_has_no_assignments():
    assert len(routing_of("zipf", 0, 8, 2).token_N) == 0


class FakeSource:
    """Records what it is asked for."""

    def __init__(self):
        self.shape = PRESETS[0].params_from().shape()
        self.asked = []

    def hidden_states(self, index, split, tokens, seed):
        self.asked.append((index, split, tokens, seed))
        return torch.zeros(tokens, self.shape.hidden)


def traffic_named(name):
    return next(d for d in TRAFFIC if d.name == name).create()


def test_gaussian_hidden_states():
    source, gaussian = FakeSource(), traffic_named("gaussian")
    x_TH = gaussian.hidden(source, 0, 500, 0, 0)
    assert x_TH.shape == (500, source.shape.hidden)
    assert x_TH.dtype == torch.float32
    assert x_TH.std().item() == pytest.approx(1, abs=0.03)
    assert torch.equal(x_TH, gaussian.hidden(source, 0, 500, 0, 0))
    for other in ((1, 500, 0, 0), (0, 500, 1, 0), (0, 500, 0, 1)):
        assert not torch.equal(x_TH, gaussian.hidden(source, *other))


def test_recorded_takes_the_same_evaluation_tokens_at_every_layer():
    source, recorded = FakeSource(), traffic_named("recorded")
    for layer, step in ((0, 0), (3, 0), (0, 1)):
        recorded.hidden(source, layer, 5, step, 0)
    a, b, c = source.asked
    assert a[1:] == b[1:]
    assert a[1] == "evaluation"
    assert c[3] != a[3]


def test_recorded_on_a_synthetic_model_is_refused():
    source = next(d for d in PRESETS if d.name == "tiny").create()
    with pytest.raises(MoebenchError, match="no recorded hidden states"):
        traffic_named("recorded").hidden(source, 0, 4, 0, 0)


def test_forced_traffic_has_gaussian_hidden_states():
    source = FakeSource()
    assert torch.equal(
        traffic_named("zipf").hidden(source, 0, 4, 1, 2), traffic_named("gaussian").hidden(source, 0, 4, 1, 2)
    )
