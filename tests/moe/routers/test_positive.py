"""BlockFFN and ReMoE: every expert with a positive logit."""

import pytest
import torch
import torch.nn.functional as nnf

from moebench.contracts import Selection, load_attribute
from moebench.moe.experts import ExpertStore
from moebench.moe.layer import LayerWeights, PreparedLayer, moe_forward
from moebench.moe.router_params.positive import DESCRIPTORS, BlockFFN, ReMoE
from moebench.moe.routing import Context
from moebench.moe.routing_metrics.chunks import sparsity_metrics
from moebench.moe.shapes import ModelShape

VARIANTS = [
    ("blockffn", BlockFFN(), {"gated": False}),
    ("blockffn", BlockFFN(epsilon=0.1), {}),
    ("remoe", ReMoE(), {}),
]
HIDDEN, EXPERTS, TOKENS = 32, 16, 48
SHAPE = ModelShape(HIDDEN, 8, EXPERTS, 2, (0, 1), Selection("softmax", 2, True), gated=False)
FACTORIES = {type(params): next(d.factory for d in DESCRIPTORS if d.name == name) for name, params, _ in VARIANTS}
every_variant = pytest.mark.parametrize("params", [variant[1] for variant in VARIANTS])


def seeded(*size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def build(params, seed=0, router_EH=None):
    weights = LayerWeights(torch.zeros(1), torch.zeros(1), router_EH)
    return load_attribute(FACTORIES[type(params)])(params)(weights, SHAPE, seed)


@every_variant
def test_the_experts_are_those_with_a_positive_logit(params):
    bundle = build(params)
    routing = bundle.router(seeded(TOKENS, HIDDEN), Context())
    assert torch.equal(routing.to_dense() > 0, routing.logits_TE > 0)
    assert params.max_k(SHAPE) == EXPERTS
    assert bundle.kinds == params.kinds(SHAPE)
    assert params.selection(SHAPE) is None


def test_remoe_weights_are_the_logits():
    routing = build(ReMoE()).router(seeded(TOKENS, HIDDEN), Context())
    torch.testing.assert_close(routing.to_dense(), routing.logits_TE.relu())
    torch.testing.assert_close(routing.probs_TE, routing.logits_TE.relu())


@pytest.mark.parametrize("gain", [1.0, 3.0])
def test_blockffn_weights_by_hand(gain):
    router = build(BlockFFN(epsilon=0.1)).router
    with torch.no_grad():
        router.norm.gain_E.fill_(gain)
    routing = router(seeded(TOKENS, HIDDEN), Context())
    relu_TE = routing.logits_TE.relu()
    expected_TE = gain * relu_TE / (relu_TE.square().mean(1, keepdim=True) + 0.1).sqrt()
    torch.testing.assert_close(routing.to_dense(), expected_TE)
    torch.testing.assert_close(routing.probs_TE, expected_TE)


def test_blockffn_does_not_see_lengths_up_to_epsilon():
    router, x_TH = build(BlockFFN()).router, seeded(TOKENS, HIDDEN)
    near_TE, far_TE = (router(factor * x_TH, Context()).to_dense() for factor in (1, 100))
    torch.testing.assert_close(near_TE, far_TE, atol=1e-3, rtol=1e-4)
    mean_T = far_TE.square().mean(1)
    torch.testing.assert_close(mean_T, torch.ones(TOKENS), atol=1e-4, rtol=0)


def test_a_token_without_experts_has_no_entries_and_no_nan():
    router = build(BlockFFN(), router_EH=-torch.ones(EXPERTS, HIDDEN)).router
    routing = router(torch.ones(3, HIDDEN), Context())
    assert len(routing.token_N) == 0
    assert (routing.probs_TE == 0).all()
    everything = router(-torch.ones(3, HIDDEN), Context())
    assert (everything.k_T == EXPERTS).all()


@every_variant
def test_half_of_the_experts_are_active_at_the_start(params):
    """At a token sparsity of a half, independent tokens share 0.5^8 of the experts as unused (0.0032 of 0.0039)."""
    routing = build(params).router(seeded(8192, HIDDEN), Context())
    figures = {metric.name: metric.value for metric in sparsity_metrics(routing)}
    assert figures["tls"] == pytest.approx(0.5, abs=0.01)
    assert figures["cls_8"] == pytest.approx(0.5**8, abs=0.0015)
    assert figures["cls_16"] <= figures["cls_8"] <= figures["cls_4"] <= figures["cls_2"] <= figures["tls"]


def test_weighting_the_hidden_is_weighting_the_output():
    """BlockFFN's own form multiplies W_in's output by the weights before W_out: the same, as W_out has no bias."""
    gate_up, down = seeded(EXPERTS, 8, HIDDEN, seed=3) / 6, seeded(EXPERTS, HIDDEN, 8, seed=4) / 3
    store = ExpertStore(gate_up, down, ("ffn",) * EXPERTS, "silu", False)
    router, x_TH = build(BlockFFN()).router, seeded(TOKENS, HIDDEN)
    gate_TE = router(x_TH, Context()).to_dense()
    hidden_TEF = nnf.silu(torch.einsum("th,efh->tef", x_TH, gate_up)) * gate_TE[:, :, None]
    own_TH = torch.einsum("tef,ehf->th", hidden_TEF, down)
    torch.testing.assert_close(moe_forward(PreparedLayer(store, router), x_TH), own_TH, atol=1e-5, rtol=1e-5)


@every_variant
def test_invalid_tokens_have_no_entries(params):
    valid_T = torch.arange(TOKENS) % 3 != 0
    router, x_TH = build(params).router, seeded(TOKENS, HIDDEN)
    routing = router(x_TH, Context(valid_T=valid_T))
    assert not routing.k_T[~valid_T].any()
    assert torch.equal(routing.to_dense()[valid_T], router(x_TH, Context()).to_dense()[valid_T])
    assert router(x_TH[:0], Context()).shape == (0, EXPERTS)


@every_variant
def test_every_parameter_learns(params):
    router = build(params).router
    gate_TE = router(seeded(TOKENS, HIDDEN), Context()).to_dense()
    (gate_TE * seeded(TOKENS, EXPERTS, seed=3)).sum().backward()
    for name, parameter in router.named_parameters():
        assert parameter.grad.abs().max() > 1e-5, name


def test_an_epsilon_of_zero_is_refused():
    with pytest.raises(ValueError, match="epsilon="):
        BlockFFN(epsilon=0.0)
