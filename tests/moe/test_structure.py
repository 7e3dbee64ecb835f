"""The channel split: exact as a whole, and a router that knows which slices matter."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moebench.moe.experts import ExpertStore
from moebench.moe.layer import LayerWeights, PreparedLayer, ffn_hidden, moe_forward
from moebench.moe.plugins import Keep, Split
from moebench.moe.routing import Routing
from moebench.moe.structure import (
    activation_rates,
    assign_balanced,
    assign_channels,
    channel_contributions,
    cluster_balanced,
    contribution_targets,
    fit_router,
    keep,
    ridge_solution,
    split,
)

H, F, E = 12, 32, 4


def generator(seed):
    return torch.Generator().manual_seed(seed)


def dense_weights(seed=0, dtype=torch.float64, hidden=H, width=F):
    g = generator(seed)
    gate_up = torch.randn(2 * width, hidden, generator=g, dtype=torch.float64).to(dtype)
    return LayerWeights(gate_up, torch.randn(hidden, width, generator=g, dtype=torch.float64).to(dtype))


def dense_forward(weights, x):
    return ffn_hidden(x, weights.gate_up, "silu") @ weights.down.T


def tokens(n, seed=1, hidden=H):
    return torch.randn(n, hidden, generator=generator(seed), dtype=torch.float64)


def forward(parts, x, routing):
    store = ExpertStore(parts.gate_up, parts.down, ("ffn",) * len(parts.down))
    return moe_forward(PreparedLayer(store, None, parts.shared), x, routing=routing)


def topic_data(seed=0, per_topic=8, hidden=24, topics=6, n=600):
    """A dense FFN whose channel f answers to topic f % topics, and tokens of one strong and one weaker topic."""
    g = generator(seed)
    direction = torch.linalg.qr(torch.randn(hidden, hidden, generator=g)).Q[:topics]
    owner = torch.arange(topics * per_topic) % topics
    noise = 0.1 * torch.randn(2, len(owner), hidden, generator=g)
    gate, up = 2 * direction[owner] + noise[0], direction[owner] + noise[1]
    weights = LayerWeights(torch.cat([gate, up]), torch.randn(hidden, len(owner), generator=g))
    pair = torch.stack([torch.randperm(topics, generator=g)[:2] for _ in range(n)])
    x = 4 * direction[pair[:, 0]] + 2 * direction[pair[:, 1]] + 0.3 * torch.randn(n, hidden, generator=g)
    return weights, x, owner


@settings(deadline=None, max_examples=20)
@given(
    st.sampled_from([1, 2, 4, 8, 16]),
    st.integers(0, 7),
    st.sampled_from(["contiguous", "coactivation"]),
    st.integers(0, 99),
)
def test_all_slices_together_are_the_dense_ffn(experts, shared, assignment, seed):
    shared = min(shared, experts - 1)
    weights, x = dense_weights(seed), tokens(40, seed + 1)
    parts = split(Split(experts, shared, 1, assignment))(weights, x, seed)
    every = Routing.dense(torch.ones(40, experts - shared, dtype=torch.float64))
    wanted = dense_forward(weights, x)
    assert (forward(parts, x, every) - wanted).abs().max() <= 1e-12 * wanted.abs().max()
    single = forward(LayerWeights(parts.gate_up.float(), parts.down.float(), shared=parts.shared), x.float(), every)
    assert (single - wanted).norm() <= 1e-5 * wanted.norm()


@settings(deadline=None, max_examples=20)
@given(st.sampled_from([2, 4, 8]), st.sampled_from(["contiguous", "coactivation"]), st.integers(0, 99))
def test_channels_are_a_permutation_cut_into_equal_parts(experts, assignment, seed):
    contribution = tokens(30, seed, F).abs().float()
    channels = assign_channels(contribution, experts, assignment, seed)
    assert channels.shape == (experts, F // experts)
    assert channels.flatten().sort().values.tolist() == list(range(F))
    assert torch.equal(channels, channels.sort(dim=1).values)


def test_contiguous_slices_lie_as_in_the_model():
    weights = dense_weights()
    parts = split(Split(E, 0, 1))(weights, tokens(40), 0)
    c = F // E
    for e in range(E):
        assert torch.equal(parts.gate_up[e, :c], weights.gate_up[e * c : (e + 1) * c])
        assert torch.equal(parts.gate_up[e, c:], weights.gate_up[F + e * c : F + (e + 1) * c])
        assert torch.equal(parts.down[e], weights.down[:, e * c : (e + 1) * c])


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 2**31))
def test_balanced_assignment_fills_every_cluster(per_cluster, clusters, seed):
    affinity = torch.randn(per_cluster * clusters, clusters, generator=generator(seed))
    owner = assign_balanced(affinity)
    assert torch.bincount(owner, minlength=clusters).tolist() == [per_cluster] * clusters


def test_clusters_do_not_fail_on_channels_that_never_vary():
    owner = cluster_balanced(torch.zeros(8, 5), 4, seed=0)
    assert torch.bincount(owner, minlength=4).tolist() == [2] * 4


def test_coactivation_finds_the_channels_that_fire_together():
    weights, x, owner = topic_data()
    found = assign_channels(channel_contributions(weights, x), 6, "coactivation", seed=0)
    assert all(len(set(owner[row].tolist())) == 1 for row in found)
    again = assign_channels(channel_contributions(weights, x), 6, "coactivation", seed=0)
    assert torch.equal(found, again)


def captured_error(parts, weights, x, indices):
    routing = Routing.topk(indices, torch.ones(indices.shape), len(parts.down))
    wanted = dense_forward(weights, x)
    return ((forward(parts, x, routing) - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("assignment", ["contiguous", "coactivation"])
def test_fitted_router_beats_a_random_one_on_tokens_it_has_not_seen(assignment, seed):
    weights, x, _ = topic_data(seed)
    parts = split(Split(6, 0, 2, assignment))(weights, x[:400], seed)
    unseen = x[400:]
    fitted = captured_error(parts, weights, unseen, (unseen @ parts.router_EH.T).topk(2).indices)
    g = generator(seed)
    random = [
        captured_error(parts, weights, unseen, (unseen @ torch.randn(24, 6, generator=g)).topk(2).indices)
        for _ in range(5)
    ]
    assert fitted < 0.95 * min(random)
    if assignment == "coactivation":
        assert fitted < 0.2


def test_router_picks_the_slices_that_make_the_largest_share():
    weights, x, _ = topic_data()
    parts = split(Split(6, 0, 2, "coactivation"))(weights, x[:400], 0)
    target = contribution_targets(parts.gate_up, parts.down, x[400:], "silu")
    hit = (x[400:] @ parts.router_EH.T).argmax(1) == target.argmax(1)
    assert hit.float().mean() > 0.95
    assert parts.router_EH.dtype == torch.float32


def test_targets_are_standardised_shares():
    weights, x = dense_weights(), tokens(50)
    parts = split(Split(E, 0, 1))(weights, x, 0)
    target = contribution_targets(parts.gate_up, parts.down, x, "silu")
    torch.testing.assert_close(target.mean(1), torch.zeros(50, dtype=torch.float64), atol=1e-9, rtol=0)
    torch.testing.assert_close(target.square().mean(1), torch.ones(50, dtype=torch.float64))
    c = F // E
    hidden, y = ffn_hidden(x, weights.gate_up, "silu"), dense_forward(weights, x)
    share = torch.stack(
        [(hidden[:, e * c : (e + 1) * c] @ weights.down[:, e * c : (e + 1) * c].T * y).sum(1) for e in range(E)], 1
    )
    assert torch.equal(share.argsort(1), target.argsort(1))


def test_a_linear_target_is_recovered():
    x, router = tokens(300), tokens(E, seed=5)
    fitted = fit_router(x, x @ router.T)
    assert (fitted - router).norm() < 2e-3 * router.norm()


def test_the_penalty_is_chosen_on_tokens_held_back():
    x, noise = tokens(60, hidden=40), tokens(60, seed=5, hidden=E)
    torch.testing.assert_close(fit_router(x, noise), ridge_solution(x, noise, 1.0).T.float())
    clean = x @ tokens(40, seed=6, hidden=E)
    torch.testing.assert_close(fit_router(x, clean), ridge_solution(x, clean, 1e-3).T.float())


def test_a_few_tokens_are_enough_to_fit_and_none_are_refused():
    parts = split(Split(E, 0, 1))(dense_weights(), tokens(3), 0)
    assert parts.router_EH.isfinite().all()
    with pytest.raises(ValueError, match="no tokens"):
        split(Split(E, 0, 1))(dense_weights(), tokens(0), 0)


def test_shared_slices_are_those_with_the_highest_activation_rate():
    weights, x = dense_weights(), tokens(200)
    c, loud = F // 8, (5, 2)
    for e in loud:
        weights.down[:, e * c : (e + 1) * c] *= 50
    contribution = channel_contributions(weights, x)
    channels = torch.arange(F).view(8, c)
    rate = activation_rates(contribution, channels, 0.5)
    assert set(rate.topk(2).indices.tolist()) == set(loud)
    parts = split(Split(8, 2, 2))(weights, x, 0)
    wanted = torch.cat([weights.down[:, e * c : (e + 1) * c] for e in sorted(loud)], 1)
    columns = {tuple(column) for column in parts.shared.down.T.tolist()}
    assert columns == {tuple(column) for column in wanted.T.tolist()}
    assert parts.shared.gate_H is None
    routed = [e for e in range(8) if e not in loud]
    for slot, e in enumerate(routed):
        assert torch.equal(parts.down[slot], weights.down[:, e * c : (e + 1) * c])
    assert parts.router_EH.shape == (6, H)


def test_activation_rate_is_the_share_of_wanted_channels():
    contribution = torch.tensor([[4.0, 3.0, 2.0, 1.0], [4.0, 1.0, 3.0, 2.0]])
    rate = activation_rates(contribution, torch.tensor([[0, 1], [2, 3]]), 0.5)
    assert rate.tolist() == [0.75, 0.25]


@pytest.mark.parametrize(
    "weights",
    [
        LayerWeights(torch.zeros(2, 8, H), torch.zeros(2, H, 4)),
        LayerWeights(torch.zeros(F, H), torch.zeros(H, F), gated=False),
    ],
)
def test_split_refuses_what_is_no_dense_gated_ffn(weights):
    with pytest.raises(ValueError, match="one dense gated FFN"):
        split(Split(2, 0, 1))(weights, tokens(4), 0)


def test_split_refuses_a_width_that_does_not_divide():
    with pytest.raises(ValueError, match="width 32 cannot be cut into 5 equal experts"):
        split(Split(5, 0, 1))(dense_weights(), tokens(4), 0)


def test_keep_returns_the_weights_themselves():
    weights = LayerWeights(torch.zeros(2, 8, H), torch.zeros(2, H, 4))
    assert keep(Keep())(weights, tokens(4), 0) is weights
