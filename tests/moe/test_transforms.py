"""Transforms without training: what they must leave exactly as it was."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moebench.contracts import Selection
from moebench.moe.experts import ExpertStore
from moebench.moe.layer import LayerWeights, PreparedLayer, SharedExpert, ffn_hidden, moe_forward
from moebench.moe.router import select
from moebench.moe.routing import Routing
from moebench.moe.transforms.aggregate import aggregate
from moebench.moe.transforms.prune import at_random, by_utilisation, prune
from moebench.moe.transforms.upcycle import mix, upcycle

H, F, E, T = 16, 12, 6, 50


def seeded(*size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def dense(seed=0):
    return LayerWeights(seeded(2 * F, H, seed=seed), seeded(H, F, seed=seed + 1))


def layer(seed=0, experts=E, **changes):
    made = LayerWeights(
        seeded(experts, 2 * F, H, seed=seed) * H**-0.5,
        seeded(experts, H, F, seed=seed + 1) * F**-0.5,
        seeded(experts, H, seed=seed + 2) * H**-0.5,
    )
    return replace(made, **changes)


def route(weights, x_TH, k, renormalize, score="softmax"):
    logits_TE = x_TH @ weights.router_EH.T
    chosen = select(logits_TE, Selection(score, k, renormalize))
    return Routing.topk(*chosen, len(weights.down), logits_TE)


def forward(weights, x_TH, k=2, renormalize=True):
    store = ExpertStore(weights.gate_up, weights.down, ("ffn",) * len(weights.down))
    routing = route(weights, x_TH, k, renormalize)
    return moe_forward(PreparedLayer(store, None, weights.shared), x_TH, routing=routing)


# --- upcycle ---------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 8), st.integers(1, 8), st.sampled_from(["softmax", "sigmoid"]), st.integers(0, 99))
def test_copies_under_renormalised_weights_are_the_ffn_whatever_the_router(experts, k, score, seed):
    """R25: 4e-8 of the norm in float32 (1.2e-7 in the prototype)."""
    k, ffn, x_TH = min(k, experts), dense(seed), seeded(T, H, seed=seed + 5)
    copies = upcycle(ffn, experts, seed)
    store = ExpertStore(copies.gate_up, copies.down, ("ffn",) * experts)
    y_TH = moe_forward(PreparedLayer(store, None), x_TH, routing=route(copies, x_TH, k, True, score))
    wanted_TH = ffn_hidden(x_TH, ffn.gate_up, "silu") @ ffn.down.T
    assert (y_TH - wanted_TH).norm() <= 1e-6 * wanted_TH.norm()


def test_copies_under_plain_weights_are_the_ffn_times_their_sum():
    ffn, x_TH = dense(), seeded(T, H, seed=5)
    copies = upcycle(ffn, E, 0)
    total_T1 = route(copies, x_TH, 2, False).to_dense().sum(1, keepdim=True)
    wanted_TH = total_T1 * (ffn_hidden(x_TH, ffn.gate_up, "silu") @ ffn.down.T)
    torch.testing.assert_close(forward(copies, x_TH, renormalize=False), wanted_TH, rtol=1e-4, atol=1e-5)


def test_noise_makes_the_copies_differ():
    plain, noisy = upcycle(dense(), E, 0), upcycle(dense(), E, 0, noise_std=0.1)
    assert torch.equal(plain.gate_up[0], plain.gate_up[1])
    assert not torch.equal(noisy.gate_up[0], noisy.gate_up[1])
    assert (noisy.down - plain.down).std() == pytest.approx(0.1, rel=0.1)
    assert torch.equal(noisy.router_EH, plain.router_EH)


def test_copies_are_their_own():
    ffn = dense()
    copies = upcycle(ffn, 3, 0)
    copies.gate_up[1] += 1
    assert torch.equal(copies.gate_up[0], ffn.gate_up)


def test_branches_become_experts_in_their_order():
    branches = [dense(10 * index) for index in range(4)]
    mixed = mix(branches, seed=3)
    assert torch.equal(mixed.down[2], branches[2].down)
    assert mixed.router_EH.shape == (4, H)
    assert mixed.router_EH.std() == pytest.approx(H**-0.5, rel=0.3)
    assert mixed.router_bias_E is None


def test_what_cannot_be_upcycled_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        upcycle(dense(), 0, 0)
    with pytest.raises(ValueError, match="dense FFNs of one shape"):
        upcycle(layer(), 2, 0)
    with pytest.raises(ValueError, match="one activation"):
        mix([dense(), replace(dense(), activation="gelu")], 0)


# --- AoE -------------------------------------------------------------------------------------------------------------


def test_a_model_with_itself_halves_the_probability():
    """R26: 0.5 exactly; under top-1 the output halves with p as weight and stays when weights are renormalised."""
    one, x_TH = layer(), seeded(T, H, seed=5)
    twice = aggregate(one, one)
    single, double = route(one, x_TH, 1, False), route(twice, x_TH, 1, False)
    ratio_T = double.weight_N / single.weight_N
    torch.testing.assert_close(ratio_T, torch.full((T,), 0.5), rtol=1e-6, atol=0)
    assert torch.equal(double.expert_N % E, single.expert_N)
    torch.testing.assert_close(forward(twice, x_TH, 1, False), 0.5 * forward(one, x_TH, 1, False))
    torch.testing.assert_close(forward(twice, x_TH, 1, True), forward(one, x_TH, 1, True))


@pytest.mark.parametrize("renormalize", [True, False])
def test_twice_the_slots_of_twice_the_experts_are_the_model_itself(renormalize):
    one, x_TH = layer(), seeded(T, H, seed=5)
    y_TH = forward(aggregate(one, one), x_TH, 4, renormalize)
    torch.testing.assert_close(y_TH, forward(one, x_TH, 2, renormalize), rtol=1e-4, atol=1e-6)


def test_experts_of_both_keep_their_order():
    first, second = layer(), layer(20, experts=4, router_bias_E=None)
    both = aggregate(first, second)
    assert len(both.down) == E + 4
    assert torch.equal(both.gate_up[E + 1], second.gate_up[1])
    assert torch.equal(both.router_EH[:E], first.router_EH)
    biased = aggregate(layer(router_bias_E=torch.zeros(E)), layer(router_bias_E=torch.ones(E)))
    assert biased.router_bias_E.tolist() == [0.0] * E + [1.0] * E


def test_what_cannot_be_aggregated_is_refused():
    with pytest.raises(ValueError, match="two layers of experts of one width"):
        aggregate(layer(), dense())
    with pytest.raises(ValueError, match="one activation"):
        aggregate(layer(), layer(activation="gelu"))
    with pytest.raises(ValueError, match="only one of the two layers has a router bias"):
        aggregate(layer(), layer(router_bias_E=torch.zeros(E)))
    shared = SharedExpert(seeded(2 * F, H), seeded(H, F))
    with pytest.raises(ValueError, match="two different shared experts"):
        aggregate(layer(), layer(shared=shared))
    assert aggregate(layer(shared=shared), layer(shared=shared)).shared is shared


# --- pruning ---------------------------------------------------------------------------------------------------------


def test_keeping_everything_changes_nothing():
    one = layer(router_bias_E=seeded(E))
    kept = prune(one, range(E))
    for name in ("gate_up", "down", "router_EH", "router_bias_E"):
        assert torch.equal(getattr(kept, name), getattr(one, name))


def test_the_gate_chooses_among_the_kept_alone():
    """Tokens whose experts were all kept are served as before, if weights are renormalised."""
    one, x_TH = layer(), seeded(200, H, seed=5)
    kept = (0, 2, 3, 5)
    chosen_TK = route(one, x_TH, 2, True).padded()[0]
    lucky_T = torch.isin(chosen_TK, torch.tensor(kept)).all(dim=1)
    assert 20 < int(lucky_T.sum()) < 180
    before, after = forward(one, x_TH), forward(prune(one, kept), x_TH)
    torch.testing.assert_close(after[lucky_T], before[lucky_T], rtol=1e-4, atol=1e-6)
    assert not torch.isclose(after[~lucky_T], before[~lucky_T], rtol=1e-3).all(dim=1).any()


def test_utilisation_keeps_the_busiest_and_more_tokens_than_chance():
    one = layer(router_EH=seeded(E, H, seed=2) * torch.linspace(0.2, 2, E)[:, None])
    routing = route(one, seeded(2000, H, seed=5), 1, False)
    busy = by_utilisation(routing.counts_E, 3)
    assert busy == tuple(sorted(routing.counts_E.topk(3).indices.tolist()))
    served = {seed: int(routing.counts_E[list(at_random(E, 3, seed))].sum()) for seed in range(20)}
    assert int(routing.counts_E[list(busy)].sum()) >= max(served.values())
    assert by_utilisation(torch.tensor([1, 5, 5, 0]), 1) == (1,), "equal loads go by rising id"


def test_random_choice_is_seeded():
    draws = [at_random(64, 8, seed) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    assert len(set(draws[0])) == 8


def test_what_cannot_be_pruned_is_refused():
    with pytest.raises(ValueError, match="no experts to prune"):
        prune(dense(), (0,))
    for kept in ((), (0, 0), (E,), (-1,)):
        with pytest.raises(ValueError, match="must be distinct ids"):
            prune(layer(), kept)
    for keep in (0, E + 1):
        with pytest.raises(ValueError, match="must lie between 1"):
            by_utilisation(torch.ones(E), keep)
        with pytest.raises(ValueError, match="must lie between 1"):
            at_random(E, keep, 0)
