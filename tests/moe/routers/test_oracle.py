"""The ends of the scale: an oracle that looks at every expert's output, and chance."""

import pytest
import torch

from moebench.contracts import Selection
from moebench.moe.experts import ExpertStore
from moebench.moe.layer import LayerWeights, PreparedLayer, expert_output, moe_forward
from moebench.moe.plugins import Split
from moebench.moe.router_params.oracle import Oracle, Random
from moebench.moe.routers.oracle import build_oracle, build_random, contributions
from moebench.moe.routing import Context, Routing
from moebench.moe.shapes import ModelShape
from moebench.moe.structure import contribution_targets, split, standardise

VARIANTS = [
    ("oracle", Oracle(), {}),
    ("oracle", Oracle(k=3), {}),
    ("random", Random(), {}),
    ("random", Random(k=5), {}),
]
T, H, F, E = 40, 24, 16, 8
SHAPE = ModelShape(H, F, E, 2, (0, 1), Selection("softmax", 2, renormalize=True))


def seeded(*size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def experts():
    return LayerWeights(seeded(E, 2 * F, H, seed=1), seeded(E, H, F, seed=2), seeded(E, H, seed=3))


def store_of(weights):
    return ExpertStore(weights.gate_up, weights.down, ("ffn",) * len(weights.down))


def brute_force(store, x_TH, gate_TE):
    terms = [expert_output(x_TH, store, e).double() * gate_TE[:, e, None] for e in range(store.num_experts)]
    return torch.stack([(term * sum(terms)).sum(1) for term in terms], dim=1)


def test_the_oracle_takes_the_experts_that_contribute_most():
    weights, x_TH = experts(), seeded(T, H)
    store = store_of(weights)
    routing = build_oracle(Oracle(k=3))(weights, SHAPE, 0).router(x_TH, Context(experts=store))
    probs_TE = torch.nn.functional.linear(x_TH, weights.router_EH).softmax(-1).double()
    best_TK = brute_force(store, x_TH, probs_TE).topk(3).indices
    indices_TK, weights_TK = routing.padded()
    assert torch.equal(indices_TK, best_TK)
    chosen_TK = probs_TE.gather(1, best_TK)
    torch.testing.assert_close(weights_TK.double(), chosen_TK / chosen_TK.sum(1, keepdim=True), rtol=1e-5, atol=1e-6)


def test_of_a_split_layer_it_ranks_what_the_router_is_fitted_to():
    dense = LayerWeights(seeded(2 * 64, H, seed=4), seeded(H, 64, seed=5))
    x_TH = seeded(T, H, seed=6)
    parts = split(Split(E, 0, 2))(dense, x_TH, 0)
    found_TE = contributions(store_of(parts), x_TH, torch.ones(T, E))
    expected_TE = contribution_targets(parts.gate_up, parts.down, x_TH, "silu")
    torch.testing.assert_close(standardise(found_TE, dim=1), expected_TE, rtol=1e-3, atol=1e-3)


def test_with_every_expert_the_choice_changes_nothing():
    weights, x_TH = experts(), seeded(T, H)
    ctx = Context(experts=store_of(weights), rng=torch.Generator().manual_seed(0))
    layer = PreparedLayer(store_of(weights), None)
    outputs = []
    for build, params in ((build_oracle, Oracle(k=E)), (build_random, Random(k=E))):
        routing = build(params)(weights, SHAPE, 0).router(x_TH, ctx)
        outputs.append(moe_forward(layer, x_TH, routing=routing))
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)


def test_the_oracle_leaves_less_out_than_chance():
    dense = LayerWeights(seeded(2 * 64, H, seed=4), seeded(H, 64, seed=5))
    x_TH = seeded(400, H, seed=6)
    parts = split(Split(E, 0, 2))(dense, x_TH, 0)
    shape = ModelShape(H, 8, E, 1, (0,), Selection("one", 2, False))
    layer, ctx = PreparedLayer(store_of(parts), None), Context(experts=store_of(parts), rng=torch.Generator())
    whole_TH = moe_forward(layer, x_TH, routing=Routing.dense(torch.ones(400, E)))

    def missing(bundle):
        return float((moe_forward(layer, x_TH, routing=bundle.router(x_TH, ctx)) - whole_TH).norm())

    assert missing(build_oracle(Oracle())(parts, shape, 0)) < 0.9 * missing(build_random(Random())(parts, shape, 0))


def test_chance_is_uniform_and_never_draws_an_expert_twice():
    router = build_random(Random(k=3))(experts(), SHAPE, 0).router
    routing = router(seeded(8000, H), Context(rng=torch.Generator().manual_seed(1)))
    assert (routing.k_T == 3).all()
    share_E = routing.counts_E / routing.counts_E.sum()
    assert share_E.min() > 0.9 / E
    assert share_E.max() < 1.1 / E


@pytest.mark.parametrize(
    ("build", "params", "field"), [(build_oracle, Oracle(), "experts"), (build_random, Random(), "rng")]
)
def test_what_they_need_is_named(build, params, field):
    with pytest.raises(ValueError, match=f"Context's '{field}'"):
        build(params)(experts(), SHAPE, 0).router(seeded(T, H), Context())


def test_more_experts_than_there_are_is_refused():
    with pytest.raises(ValueError, match="between 1 and the layer's 8"):
        Oracle(k=9).kinds(SHAPE)
