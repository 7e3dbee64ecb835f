"""MoE-X: the firing rate that it predicts (R7), the wide layer that it is (R8), and what it reads from the experts."""

import copy

import pytest
import torch
import torch.nn.functional as nnf

from moebench.contracts import Selection, load_attribute
from moebench.moe.experts import ExpertStore
from moebench.moe.layer import LayerWeights, PreparedLayer, moe_forward
from moebench.moe.plugins import Int4
from moebench.moe.quantization import coded
from moebench.moe.router import select
from moebench.moe.router_params.moex import DESCRIPTORS, MoEX
from moebench.moe.routing import Context
from moebench.moe.shapes import ModelShape

VARIANTS = [
    ("moex", MoEX(), {"gated": False, "activation": "relu"}),
    ("moex", MoEX(k=3), {}),
]
HIDDEN, WIDTH, EXPERTS, TOKENS = 32, 256, 8, 64
SHAPE = ModelShape(HIDDEN, WIDTH, EXPERTS, 2, (0, 1), Selection("softmax", 2, True), activation="relu", gated=False)


def seeded(*size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def gaussian_store(width=WIDTH, gated=False, seed=0):
    """Experts whose first weights are Gaussian per input channel, with means and variances of their own."""
    rows = 2 * width if gated else width
    mean_EH = 0.3 * seeded(EXPERTS, 1, HIDDEN, seed=seed)
    deviation_EH = 0.5 + seeded(EXPERTS, 1, HIDDEN, seed=seed + 1).abs()
    gate_up = mean_EH + deviation_EH * seeded(EXPERTS, rows, HIDDEN, seed=seed + 2)
    down = seeded(EXPERTS, HIDDEN, width, seed=seed + 3) / width
    return ExpertStore(gate_up, down, ("ffn",) * EXPERTS, "relu", gated)


def build(params=None, router_EH=None):
    weights = LayerWeights(torch.zeros(1), torch.zeros(1), router_EH)
    return load_attribute(DESCRIPTORS[0].factory)(params or MoEX())(weights, SHAPE, 0)


def hidden_of(store, x_TH):
    """What every expert has after its ReLU, [T, E, F]."""
    return torch.einsum("th,efh->tef", x_TH, store.gate_up).relu()


def test_a_copy_of_the_router_copies_no_experts():
    store, router = gaussian_store(), build(MoEX(k=2)).router
    router(seeded(TOKENS, HIDDEN), Context(experts=store))
    assert copy.deepcopy(router).scorer._store() is store


@pytest.mark.parametrize("gated", [False, True])
def test_scores_by_hand(gated):
    store, x_TH = gaussian_store(gated=gated), seeded(5, HIDDEN, seed=9)
    routing = build().router(x_TH, Context(experts=store))
    for token in range(5):
        for expert in range(EXPERTS):
            rows_FH = store.gate_up[expert, :WIDTH]
            mean = (x_TH[token] * rows_FH.mean(0)).sum()
            variance = (x_TH[token].square() * rows_FH.var(0, correction=0)).sum()
            expected = -torch.erf(mean / (2 * variance).sqrt())
            assert float(routing.logits_TE[token, expert]) == pytest.approx(float(expected), abs=1e-5)
    indices_TK, weights_TK = select(routing.logits_TE, MoEX().selection(SHAPE))
    assert torch.equal(routing.padded()[0], indices_TK)
    assert torch.equal(routing.padded()[1], weights_TK)


def test_scores_predict_how_often_neurons_fire():
    """R7: correlation 0.996 and largest error 0.023 with F = 2000 (0.9955 and 0.021 in the prototype)."""
    store, x_TH = gaussian_store(width=2000), seeded(200, HIDDEN, seed=9)
    predicted_TE = (1 - build().router(x_TH, Context(experts=store)).logits_TE) / 2
    observed_TE = hidden_of(store, x_TH).gt(0).float().mean(-1)
    correlation = torch.corrcoef(torch.stack([predicted_TE.flatten(), observed_TE.flatten()]))[0, 1]
    assert correlation > 0.995
    assert (predicted_TE - observed_TE).abs().max() < 0.03


def test_selected_experts_fire_less_than_the_others():
    store, x_TH = gaussian_store(), seeded(TOKENS, HIDDEN, seed=9)
    routing = build().router(x_TH, Context(experts=store))
    active_TE = hidden_of(store, x_TH).gt(0).float().mean(-1)
    chosen_TE = routing.to_dense() > 0
    assert active_TE[chosen_TE].mean() < active_TE[~chosen_TE].mean() - 0.1


def test_the_layer_is_one_wide_sparse_mlp():
    """R8: y = (ReLU(x [W_1 .. W_E]) * gate) W_2, each expert's gate repeated over its neurons.

    Off by 3e-7 of the largest output (7e-7 in the prototype).
    """
    store, x_TH = gaussian_store(), seeded(TOKENS, HIDDEN, seed=9)
    layer, ctx = PreparedLayer(store, build().router), Context(experts=store)
    gate_TE = layer.router(x_TH, ctx).to_dense()
    wide_TF = nnf.relu(x_TH @ store.gate_up.flatten(0, 1).T) * gate_TE.repeat_interleave(WIDTH, dim=1)
    expected_TH = wide_TF @ store.down.transpose(0, 1).flatten(1).T
    y_TH = moe_forward(layer, x_TH, ctx)
    assert (y_TH - expected_TH).abs().max() < 2e-6 * expected_TH.abs().max()


def test_there_is_nothing_to_train_and_the_layers_router_is_not_used():
    bundle = build(router_EH=seeded(EXPERTS, HIDDEN))
    assert not list(bundle.router.parameters())
    assert bundle.router.needs == {"experts"}
    x_TH = seeded(TOKENS, HIDDEN).requires_grad_()
    bundle.router(x_TH, Context(experts=gaussian_store())).weight_N.square().sum().backward()
    assert x_TH.grad.abs().max() > 1e-5


def test_experts_are_read_once_until_something_changes():
    store, x_TH = gaussian_store(), seeded(TOKENS, HIDDEN, seed=9)
    router = build().router
    before_TE = router(x_TH, Context(experts=store)).logits_TE
    store.gate_up[0] += 1
    assert torch.equal(router(x_TH, Context(experts=store)).logits_TE, before_TE)
    changed_TE = router(x_TH, Context(experts=store, training=True)).logits_TE
    assert not torch.equal(changed_TE, before_TE)
    store.gate_up[0] -= 1
    routing = router(x_TH, Context(experts=store))
    assert torch.equal(routing.logits_TE, changed_TE)
    router.update(routing)
    torch.testing.assert_close(router(x_TH, Context(experts=store)).logits_TE, before_TE)
    assert not torch.equal(router(x_TH, Context(experts=gaussian_store(seed=50))).logits_TE, before_TE)


def test_quantizing_the_experts_changes_the_routing():
    store, x_TH = gaussian_store(), seeded(400, HIDDEN, seed=9)
    router = build().router
    dense = router(x_TH, Context(experts=store))
    packed = router(x_TH, Context(experts=coded(Int4(group=32))(store, None)))
    agree = (dense.to_dense().gt(0) == packed.to_dense().gt(0)).all(1).float().mean()
    assert 0.5 < agree < 1
    assert (dense.logits_TE - packed.logits_TE).abs().max() < 0.1


def test_absent_experts_are_named():
    with pytest.raises(ValueError, match="'experts'"):
        build().router(seeded(TOKENS, HIDDEN), Context())


def test_experts_without_weights_cannot_be_scored():
    store = gaussian_store()
    mixed = ExpertStore(store.gate_up, store.down, (*store.kinds, "zero"), "relu", False)
    with pytest.raises(ValueError, match="zero"):
        build().router(seeded(TOKENS, HIDDEN), Context(experts=mixed))


def test_invalid_tokens_and_no_tokens():
    store, valid_T = gaussian_store(), torch.arange(TOKENS) % 3 != 0
    routing = build().router(seeded(TOKENS, HIDDEN), Context(experts=store, valid_T=valid_T))
    assert torch.equal(routing.k_T, 2 * valid_T.long())
    assert build().router(torch.zeros(0, HIDDEN), Context(experts=store)).shape == (0, EXPERTS)
