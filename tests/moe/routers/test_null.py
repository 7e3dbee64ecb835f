"""AdaMoE: how many true experts a token has, what their weights add up to, and what they can teach the router."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moebench.contracts import Selection, load_attribute
from moebench.moe.balance.load import switch
from moebench.moe.layer import LayerWeights
from moebench.moe.router_params.null import DESCRIPTORS, AdaMoE
from moebench.moe.routing import Context
from moebench.moe.shapes import ModelShape

VARIANTS = [
    ("adamoe", AdaMoE(), {}),
    ("adamoe", AdaMoE(k=3, null=5), {}),
    ("adamoe", AdaMoE(k=2, null=0), {}),
]
HIDDEN, TOKENS = 32, 48
every_variant = pytest.mark.parametrize("params", [variant[1] for variant in VARIANTS])


def seeded(*size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def shape_of(experts=16, hidden=HIDDEN):
    return ModelShape(hidden, 8, experts, 2, (0, 1), Selection("softmax", 2, True))


def build(params, seed=0, router_EH=None, shape=None):
    weights = LayerWeights(torch.zeros(1), torch.zeros(1), router_EH)
    return load_attribute(DESCRIPTORS[0].factory)(params)(weights, shape or shape_of(), seed)


def even(params, experts):
    """The router where every logit is a number of its own: x holds the logits."""
    bundle = build(params, shape=shape_of(experts, hidden=experts + params.null))
    with torch.no_grad():
        bundle.router.scorer.weight_EH.copy_(torch.eye(experts + params.null))
    return bundle


@pytest.mark.parametrize(("experts", "null", "k"), [(8, 8, 4), (16, 5, 3), (8, 0, 2), (4, 12, 1)])
def test_true_experts_are_those_of_the_ratio(experts, null, k):
    """R2: K n / (n + m): 1.9995 of 2.0 and 2.2901 of 2.2857 (2.0008 and 2.2863 in the prototype)."""
    routing = even(AdaMoE(k=k, null=null), experts).router(seeded(40_000, experts + null), Context())
    assert float(routing.k_T.double().mean()) == pytest.approx(k * experts / (experts + null), abs=0.02)
    assert int(routing.k_T.max()) == min(k, experts)


@settings(deadline=None, max_examples=60)
@given(experts=st.integers(1, 8), null=st.integers(0, 8), data=st.data())
def test_weights_by_hand(experts, null, data):
    """The true experts among the best k share 1 by their probabilities; a token without any has nothing."""
    k = data.draw(st.integers(1, experts + null))
    x_TH = seeded(8, experts + null, seed=data.draw(st.integers(0, 99)))
    routing = even(AdaMoE(k=k, null=null), experts).router(x_TH, Context())
    for token in range(8):
        probs_E = x_TH[token].softmax(-1)
        true = [expert for expert in probs_E.topk(k).indices.tolist() if expert < experts]
        expected_E = torch.zeros(experts + null)
        expected_E[true] = probs_E[true] / probs_E[true].sum() if true else 0.0
        torch.testing.assert_close(routing.to_dense()[token], expected_E)


@every_variant
def test_weights_add_up_to_one_or_nothing(params):
    bundle = build(params)
    routing = bundle.router(seeded(400, HIDDEN), Context())
    sum_T = routing.to_dense().sum(1)
    torch.testing.assert_close(sum_T, (routing.k_T > 0).float())
    assert (routing.expert_N < 16).all()
    assert bundle.kinds == params.kinds(shape_of())
    assert int(routing.k_T.max()) <= params.max_k(shape_of())


def test_without_nulls_it_is_mixtral():
    routing = build(AdaMoE(k=2, null=0)).router(seeded(TOKENS, HIDDEN), Context())
    best = routing.logits_TE.topk(2)
    assert torch.equal(routing.padded()[0], best.indices)
    torch.testing.assert_close(routing.padded()[1], best.values.softmax(-1))


def test_null_rows_follow_the_models_own():
    router_EH = seeded(16, HIDDEN, seed=6) * 0.01
    bundle = build(AdaMoE(null=5), router_EH=router_EH)
    rows_EH = bundle.router.scorer.weight_EH
    assert bundle.kinds == ("ffn",) * 16 + ("zero",) * 5
    assert torch.equal(rows_EH[:16], router_EH)
    assert rows_EH[16:].detach().std() == pytest.approx(float(router_EH.std()), rel=0.3)
    assert len(build(AdaMoE()).kinds) == 32


def test_a_lone_true_expert_teaches_nothing():
    """R28: its weight is 1 whatever the logits; the balance loss alone reaches the router."""
    router = build(AdaMoE(k=3)).router
    x_TH = seeded(400, HIDDEN)
    lone_T = router(x_TH, Context()).k_T == 1
    assert lone_T.sum() > 50
    routing = router(x_TH[lone_T], Context())
    torch.testing.assert_close(routing.weight_N, torch.ones(len(routing.weight_N)))
    routing.weight_N.square().sum().backward()
    assert float(router.scorer.weight_EH.grad.abs().max()) < 1e-4
    router.zero_grad()
    switch(router(x_TH[lone_T], Context()), bucket=range(16, 32), slots=3).backward()
    assert float(router.scorer.weight_EH.grad.abs().max()) > 1e-4


@pytest.mark.parametrize(
    ("changes", "message"), [({"null": -1}, "null=-1"), ({"k": 33}, "the 32 true"), ({"k": 0}, "k=0")]
)
def test_impossible_parameters_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        AdaMoE(**changes).kinds(shape_of())
