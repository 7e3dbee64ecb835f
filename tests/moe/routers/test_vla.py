"""AdaMoE-VLA: weights that the router does not decide alone."""

import pytest
import torch

from moebench.contracts import Selection, load_attribute
from moebench.moe.balance.load import switch
from moebench.moe.experts import ExpertStore
from moebench.moe.layer import LayerWeights, PreparedLayer, SharedExpert, ffn_hidden, moe_forward
from moebench.moe.router import select
from moebench.moe.router_params.vla import DESCRIPTORS, AdaMoEVLA
from moebench.moe.routing import Context
from moebench.moe.shapes import ModelShape

VARIANTS = [
    ("adamoe_vla", AdaMoEVLA(), {}),
    ("adamoe_vla", AdaMoEVLA(k=2, std=0.35), {"experts": 8}),
    ("adamoe_vla", AdaMoEVLA(k=2, adapter="concat"), {}),
]
HIDDEN, EXPERTS, TOKENS = 32, 8, 48
SHAPE = ModelShape(HIDDEN, 8, EXPERTS, 2, (0, 1), Selection("softmax", 2, True))


def seeded(*size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def build(params, seed=0):
    weights = LayerWeights(torch.zeros(EXPERTS, 16, HIDDEN), torch.zeros(EXPERTS, HIDDEN, 8))
    return load_attribute(DESCRIPTORS[0].factory)(params)(weights, SHAPE, seed)


@pytest.mark.parametrize("adapter", ["add", "concat"])
def test_weights_by_hand(adapter):
    router, x_TH = build(AdaMoEVLA(k=2, adapter=adapter)).router, seeded(TOKENS, HIDDEN)
    routing = router(x_TH, Context())
    probs_TE = (x_TH @ router.scorer.weight_EH.T).softmax(-1)
    if adapter == "add":
        weights_TE = probs_TE + x_TH @ router.adapter.weight_EH.T
    else:
        weights_TE = (torch.cat([x_TH, probs_TE], dim=1) @ router.adapter.weight_EH.T).softmax(-1)
    best_TK = probs_TE.topk(2).indices
    assert torch.equal(routing.padded()[0], best_TK)
    torch.testing.assert_close(routing.padded()[1], weights_TE.gather(1, best_TK))
    torch.testing.assert_close(routing.probs_TE, probs_TE)


def test_without_an_adapter_it_is_top_k_not_renormalised():
    routing = build(AdaMoEVLA(k=2, std=0.0)).router(seeded(TOKENS, HIDDEN), Context())
    indices_TK, weights_TK = select(routing.logits_TE, Selection("softmax", 2, renormalize=False))
    assert torch.equal(routing.padded()[0], indices_TK)
    assert torch.equal(routing.padded()[1], weights_TK)


def test_weights_may_be_negative_and_sum_to_anything():
    """An adapter of standard deviation 0.35: sums of 0.56 +- 0.51 and 21 % negative in the prototype (k and E unsaid).

    With k = 2 of 8 experts two routers have 0.49 +- 0.46 with 24 % and 0.57 +- 0.54 with 22 %.
    """
    routing = build(AdaMoEVLA(k=2, std=0.35), seed=1).router(seeded(20_000, HIDDEN), Context())
    sum_T = routing.to_dense().sum(1)
    assert float(sum_T.mean()) == pytest.approx(0.56, abs=0.06)
    assert float(sum_T.detach().std()) == pytest.approx(0.51, abs=0.05)
    assert float((routing.weight_N < 0).double().mean()) == pytest.approx(0.21, abs=0.04)


@pytest.mark.parametrize("adapter", ["add", "concat"])
def test_the_balance_loss_does_not_reach_the_adapter(adapter):
    router = build(AdaMoEVLA(k=2, adapter=adapter)).router
    switch(router(seeded(TOKENS, HIDDEN), Context())).backward()
    assert router.adapter.weight_EH.grad is None
    assert router.scorer.weight_EH.grad.abs().max() > 1e-5


def test_the_task_reaches_the_router_through_the_selected_alone():
    router, x_TH = build(AdaMoEVLA(k=1)).router, seeded(TOKENS, HIDDEN)
    routing = router(x_TH, Context())
    (gradient_TE,) = torch.autograd.grad(routing.weight_N.sum(), routing.probs_TE, retain_graph=True)
    assert torch.equal(gradient_TE != 0, routing.to_dense() != 0)
    routing.weight_N.sum().backward()
    unused_E = routing.counts_E == 0
    assert (router.adapter.weight_EH.grad.abs().amax(1) == 0).equal(unused_E)


def test_at_upcycling_the_layer_is_the_dense_ffn_times_the_sum_of_weights():
    """All experts and the shared one are the dense FFN: y = (sum of weights) f(x) + f(x)."""
    gate_up, down = seeded(16, HIDDEN, seed=3) / 6, seeded(HIDDEN, 8, seed=4) / 3
    store = ExpertStore(gate_up.expand(EXPERTS, -1, -1), down.expand(EXPERTS, -1, -1), ("ffn",) * EXPERTS)
    router, x_TH = build(AdaMoEVLA(k=2)).router, seeded(TOKENS, HIDDEN)
    y_TH = moe_forward(PreparedLayer(store, router, SharedExpert(gate_up, down)), x_TH)
    dense_TH = ffn_hidden(x_TH, gate_up, "silu") @ down.T
    sum_T1 = router(x_TH, Context()).to_dense().sum(1, keepdim=True)
    torch.testing.assert_close(y_TH, (sum_T1 + 1) * dense_TH, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(("changes", "message"), [({"k": 9}, "the layer's 8 experts"), ({"std": -1.0}, "std=-1.0")])
def test_impossible_parameters_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        AdaMoEVLA(**changes).kinds(SHAPE)
