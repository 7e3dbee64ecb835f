"""MixER's refit (R20) and the outer layer of DMoERM: one expert per environment or sequence."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moebench.contracts import Selection, load_attribute
from moebench.moe.layer import LayerWeights
from moebench.moe.router import select
from moebench.moe.router_params.environment import DESCRIPTORS, DMoERM, MixER
from moebench.moe.routers.environment import EnvironmentLosses, experts_of_clusters, fit_map, k_means, with_one
from moebench.moe.routing import Context
from moebench.moe.shapes import ModelShape

VARIANTS = [
    ("mixer", MixER(), {}),
    ("mixer", MixER(features=3), {"experts": 2}),
    ("dmoerm", DMoERM(), {}),
]
HIDDEN, EXPERTS, SEGMENTS, TOKENS = 32, 10, 8, 48
SHAPE = ModelShape(HIDDEN, 8, EXPERTS, 2, (0, 1), Selection("softmax", 2, True))
SEGMENT_T = torch.arange(TOKENS) * SEGMENTS // TOKENS


def seeded(*size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def build(name, params, seed=0, router_EH=None):
    weights = LayerWeights(torch.zeros(EXPERTS, 16, HIDDEN), torch.zeros(EXPERTS, HIDDEN, 8), router_EH)
    factory = next(descriptor.factory for descriptor in DESCRIPTORS if descriptor.name == name)
    return load_attribute(factory)(params)(weights, SHAPE, seed)


def experts_of(routing):
    return routing.padded()[0][:, 0]


# --- MixER -----------------------------------------------------------------------------------------------------------


def clusters(per_cluster=20, spread=0.1):
    """Context vectors around ten separated centres, in random order, and their cluster."""
    cluster_S = torch.arange(EXPERTS).repeat(per_cluster)
    cluster_S = cluster_S[torch.randperm(len(cluster_S), generator=torch.Generator().manual_seed(5))]
    return 3 * seeded(EXPERTS, 16, seed=1)[cluster_S] + spread * seeded(len(cluster_S), 16, seed=2), cluster_S


def losses_for(expert_S, noise=0.3):
    """Losses that are lowest, on the whole, for the expert of each environment."""
    loss_SE = 1 + noise * seeded(len(expert_S), EXPERTS, seed=6).abs()
    return loss_SE.scatter_add(1, expert_S[:, None], torch.full((len(expert_S), 1), -1.0))


def test_refit_recovers_the_clusters():
    """R20: 10 clusters x 20 environments; after one update every environment has the expert made for it."""
    features_SD, cluster_S = clusters()
    wanted_S = torch.randperm(EXPERTS, generator=torch.Generator().manual_seed(8))[cluster_S]
    router = build("mixer", MixER()).router
    ctx = Context(features=features_SD, segment_T=torch.arange(len(features_SD)))
    before = router(torch.zeros(len(features_SD), HIDDEN), ctx)
    router.update(before, EnvironmentLosses(features_SD, losses_for(wanted_S)))
    after = router(torch.zeros(len(features_SD), HIDDEN), ctx)
    assert (experts_of(before) == wanted_S).float().mean() < 0.5
    assert (experts_of(after) == wanted_S).all()
    assert (after.weight_N == 1).all()


def test_nothing_changes_without_losses_or_clusters():
    router = build("mixer", MixER()).router
    map_ED1 = router.scorer.map_ED1.clone()
    routing = router(torch.zeros(1, HIDDEN), Context(features=torch.zeros(1, 16), segment_T=torch.zeros(1).long()))
    router.update(routing)
    for features_SD in (seeded(EXPERTS - 1, 16), torch.zeros(40, 16)):
        router.update(routing, EnvironmentLosses(features_SD, torch.zeros(len(features_SD), EXPERTS)))
    assert torch.equal(router.scorer.map_ED1, map_ED1)


def test_k_means_groups_what_lies_together():
    features_SD, cluster_S = clusters()
    found_S = k_means(features_SD, EXPERTS)
    pairs = set(zip(cluster_S.tolist(), found_S.tolist(), strict=True))
    assert len(pairs) == EXPERTS
    assert k_means(torch.zeros(40, 16), 2) is None
    assert k_means(seeded(3, 16), 4) is None


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(0, 10, width=32), min_size=12, max_size=12))
def test_no_two_clusters_share_an_expert(values):
    loss_SE = torch.tensor(values).view(4, 3)
    assert sorted(experts_of_clusters(torch.tensor([0, 1, 2, 1]), loss_SE).tolist()) == [0, 1, 2]


def test_clusters_choose_in_order_by_median():
    """Cluster 0 has medians 1, 2 and takes expert 0; cluster 1 prefers it too and takes what is left."""
    loss_SE = torch.tensor([[1.0, 2.0], [1.0, 2.0], [9.0, 2.0], [0.0, 5.0]])
    assert experts_of_clusters(torch.tensor([0, 0, 0, 1]), loss_SE).tolist() == [0, 1]
    assert experts_of_clusters(torch.tensor([1, 1, 1, 0]), loss_SE).tolist() == [0, 1]


def test_fit_is_least_squares_with_a_constant():
    features_SD, expert_S = seeded(50, 4), torch.arange(50) % 3
    map_ED1 = fit_map(features_SD, expert_S, 3)
    residual_SE = with_one(features_SD.double()) @ map_ED1.T - torch.nn.functional.one_hot(expert_S).double()
    normal_D1E = with_one(features_SD.double()).T @ residual_SE
    torch.testing.assert_close(normal_D1E, torch.zeros(5, 3).double(), atol=1e-9, rtol=0)


def test_an_environment_has_one_expert_and_no_gradient():
    router = build("mixer", MixER()).router
    ctx = Context(features=seeded(SEGMENTS, 16), segment_T=SEGMENT_T)
    routing = router(seeded(TOKENS, HIDDEN), ctx)
    expert_ST = experts_of(routing).view(SEGMENTS, -1)
    assert (expert_ST == expert_ST[:, :1]).all()
    assert torch.equal(expert_ST[:, 0], (with_one(ctx.features) @ router.scorer.map_ED1.T).argmax(1))
    assert not list(router.parameters())
    assert "scorer.map_ED1" in router.state_dict()
    indices_TK, weights_TK = select(routing.logits_TE, MixER().selection(SHAPE))
    assert torch.equal(routing.padded()[0], indices_TK)
    assert torch.equal(routing.padded()[1], weights_TK)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": None}, "'features'"),
        ({"segment_T": None}, "'segment_T'"),
        ({"features": seeded(SEGMENTS, 15)}, "16 are mapped"),
        ({"features": seeded(SEGMENTS - 1, 16)}, r"'segment_T' must lie in \[0, 7\)"),
    ],
)
def test_every_token_needs_a_context_vector(changes, message):
    ctx = Context(**{"features": seeded(SEGMENTS, 16), "segment_T": SEGMENT_T, **changes})
    with pytest.raises(ValueError, match=message):
        build("mixer", MixER()).router(seeded(TOKENS, HIDDEN), ctx)


def test_parameters_are_checked():
    with pytest.raises(ValueError, match="features=0"):
        MixER(features=0)


# --- DMoERM ----------------------------------------------------------------------------------------------------------


def test_the_last_token_decides_for_its_sequence():
    router_EH, x_TH = seeded(EXPERTS, HIDDEN, seed=4), seeded(TOKENS, HIDDEN)
    router = build("dmoerm", DMoERM(), router_EH=router_EH).router
    expert_ST = experts_of(router(x_TH, Context(segment_T=SEGMENT_T + 3))).view(SEGMENTS, -1)
    expected_S = (x_TH.view(SEGMENTS, -1, HIDDEN)[:, -1] @ router_EH.T).argmax(1)
    assert torch.equal(expert_ST, expected_S[:, None].expand_as(expert_ST))
    assert not router.causal


def test_the_last_valid_token_decides():
    x_TH = seeded(TOKENS, HIDDEN)
    router = build("dmoerm", DMoERM()).router
    valid_T = torch.arange(TOKENS) % 6 < 4
    routing = router(x_TH, Context(segment_T=SEGMENT_T, valid_T=valid_T))
    assert torch.equal(routing.k_T, valid_T.long())
    short = router(x_TH[valid_T], Context(segment_T=SEGMENT_T[valid_T]))
    assert torch.equal(routing.to_dense()[valid_T], short.to_dense())


def test_dmoerm_without_segments_or_tokens():
    router = build("dmoerm", DMoERM()).router
    with pytest.raises(ValueError, match="'segment_T'"):
        router(seeded(TOKENS, HIDDEN), Context())
    assert router(torch.zeros(0, HIDDEN), Context(segment_T=torch.zeros(0).long())).shape == (0, EXPERTS)


def test_classification_loss_can_teach_the_outer_layer():
    router = build("dmoerm", DMoERM()).router
    routing = router(seeded(TOKENS, HIDDEN), Context(segment_T=SEGMENT_T))
    assert not routing.weight_N.requires_grad
    torch.nn.functional.cross_entropy(routing.logits_TE, torch.zeros(TOKENS).long()).backward()
    assert router.scorer.scorer.weight_EH.grad.abs().max() > 1e-4
