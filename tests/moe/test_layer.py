"""moe_forward against the dense sum over a gate matrix, for every kind of expert."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moebench.contracts import MoebenchError
from moebench.moe.channels import SiteRule, Sparsity
from moebench.moe.experts import Constants, ExpertStore
from moebench.moe.layer import LayerWeights, PreparedLayer, SharedExpert, expert_output, moe_forward
from moebench.moe.routing import Context, Routing

H, F, S, T = 6, 4, 3, 9


class FixedRouter(torch.nn.Module):
    """Returns the Routing it was given."""

    def __init__(self, routing):
        super().__init__()
        self.routing = routing
        self.seen = []

    def forward(self, x_TH, ctx):
        self.seen.append(ctx)
        return self.routing


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def make_store(kinds=("ffn", "ffn"), gated=True, sparsity=None):
    n, c = kinds.count("ffn"), kinds.count("constant")
    constants = Constants(randn(c, 2, H, seed=7), randn(c, H, seed=8)) if c else None
    rows = 2 * F if gated else F
    gate_up, down = randn(n, rows, H, seed=1), randn(n, H, F, seed=2)
    return ExpertStore(gate_up, down, tuple(kinds), gated=gated, constants=constants, sparsity=sparsity)


def make_shared(gated=True):
    return SharedExpert(randn(2 * S, H, seed=3), randn(H, S, seed=4), randn(H, seed=5) if gated else None)


def ffn(x, gate_up, down):
    rows = gate_up.shape[0] // 2
    gate, up = x @ gate_up[:rows].T, x @ gate_up[rows:].T
    return (gate * torch.sigmoid(gate) * up) @ down.T


def layer_of(store, shared=None, routing=None):
    return PreparedLayer(store, FixedRouter(routing), shared)


gates = st.lists(st.sampled_from([0.0, 0.0, 1.0, -0.5, 2.5]), min_size=T * 3, max_size=T * 3)


@settings(deadline=None, max_examples=40)
@given(gates)
def test_is_the_gate_matrix_times_the_expert_outputs(values):
    gate_TE = torch.tensor(values, dtype=torch.float64).reshape(T, 3)
    store, x = make_store(("ffn", "ffn", "ffn")), randn(T, H)
    each = torch.stack([ffn(x, store.gate_up[e], store.down[e]) for e in range(3)], dim=1)
    y = moe_forward(layer_of(store), x, routing=Routing.dense(gate_TE))
    torch.testing.assert_close(y, (gate_TE[:, :, None] * each).sum(1), rtol=1e-12, atol=1e-12)


def test_every_kind_has_its_own_mathematics():
    store, x = make_store(("ffn", "constant", "copy", "zero", "ffn", "constant")), randn(T, H)
    outputs = [expert_output(x, store, e) for e in range(6)]
    torch.testing.assert_close(outputs[0], ffn(x, store.gate_up[0], store.down[0]))
    torch.testing.assert_close(outputs[4], ffn(x, store.gate_up[1], store.down[1]))
    assert torch.equal(outputs[2], x)
    assert torch.count_nonzero(outputs[3]) == 0
    for place, expert in enumerate((1, 5)):
        mix = torch.softmax(x @ store.constants.gate_C2H[place].T, dim=-1)
        wanted = mix[:, :1] * x + mix[:, 1:] * store.constants.value_CH[place]
        torch.testing.assert_close(outputs[expert], wanted)
    gate_TE = randn(T, 6, seed=11)
    y = moe_forward(layer_of(store), x, routing=Routing.dense(gate_TE))
    torch.testing.assert_close(y, (gate_TE[:, :, None] * torch.stack(outputs, 1)).sum(1))


def test_unknown_kind_is_refused_in_a_sentence():
    store = make_store(("ffn", "lora"))
    with pytest.raises(MoebenchError, match="expert 1 of kind 'lora'"):
        moe_forward(layer_of(store), randn(T, H), routing=Routing.dense(torch.ones(T, 2)))


@pytest.mark.parametrize("gated", [True, False])
def test_shared_expert_is_added_for_every_token(gated):
    shared, x = make_shared(gated), randn(T, H)
    empty = Routing.dense(torch.zeros(T, 2))
    wanted = ffn(x, shared.gate_up, shared.down)
    if gated:
        wanted = wanted / (1 + torch.exp(-(x * shared.gate_H).sum(-1, keepdim=True)))
    torch.testing.assert_close(moe_forward(layer_of(make_store(), shared), x, routing=empty), wanted)
    torch.testing.assert_close(shared.forward(x), wanted)


def mixed(mix_2H):
    return SharedExpert(randn(2 * S, H, seed=3), randn(H, S, seed=4), mix_2H=mix_2H)


def test_a_mix_weighs_the_routed_sum_and_the_shared_output():
    """Both sides of softmax(W x), as DeepSpeed has it; equal rows halve both."""
    store, x, routing = make_store(), randn(T, H), Routing.dense(randn(T, 2, seed=9))
    routed, own = moe_forward(layer_of(store), x, routing=routing), ffn(x, randn(2 * S, H, seed=3), randn(H, S, seed=4))
    mix_T2 = torch.softmax(x @ randn(2, H, seed=6).T, dim=-1)
    y = moe_forward(layer_of(store, mixed(randn(2, H, seed=6))), x, routing=routing)
    torch.testing.assert_close(y, mix_T2[:, :1] * routed + mix_T2[:, 1:] * own)
    y = moe_forward(layer_of(store, mixed(torch.ones(2, H, dtype=torch.float64))), x, routing=routing)
    torch.testing.assert_close(y, (routed + own) / 2)


def test_a_mix_that_has_decided_leaves_one_side_exactly():
    """c = (0, 1) is the dense FFN, bit for bit, and c = (1, 0) the experts."""
    store, x, routing = make_store(), randn(T, H), Routing.dense(randn(T, 2, seed=9))
    x[:, 0] = 1.0
    sides = [moe_forward(layer_of(store), x, routing=routing), mixed(None)(x)]
    for side, wanted in enumerate(sides):
        mix_2H = torch.zeros(2, H, dtype=torch.float64)
        mix_2H[side, 0] = 2000.0
        assert torch.equal(moe_forward(layer_of(store, mixed(mix_2H)), x, routing=routing), wanted)


def test_a_mix_is_a_factor_of_the_routings_weights():
    store, x, routing = make_store(), randn(T, H), Routing.dense(randn(T, 2, seed=9))
    shared = mixed(randn(2, H, seed=6))
    share_T = torch.softmax(x @ shared.mix_2H.T, dim=-1)[:, 0]
    scaled = routing.scaled(share_T[routing.token_N])
    wanted = moe_forward(layer_of(store), x, routing=scaled) + shared(x)
    torch.testing.assert_close(moe_forward(layer_of(store, shared), x, routing=routing), wanted)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["none", "sigmoid", "softmax2"])
def test_adding_in_place_is_adding(kind, dtype):
    shared = {"none": mixed(None), "sigmoid": make_shared(), "softmax2": mixed(randn(2, H, seed=6))}[kind]
    x, routed = randn(T, H).to(dtype), randn(T, H, seed=12).to(dtype)
    y = routed.clone()
    shared.add_to_(y, x)
    torch.testing.assert_close(y, shared.added_to(routed, x).to(dtype))
    assert not torch.allclose(y, routed)


def test_a_shared_expert_has_one_gate():
    with pytest.raises(ValueError, match="give one of them"):
        SharedExpert(randn(2 * S, H), randn(H, S), randn(H), mix_2H=randn(2, H))


def test_an_ungated_shared_expert_uses_one_matrix():
    shared, x = SharedExpert(randn(S, H, seed=3), randn(H, S, seed=4), gated=False), randn(T, H)
    hidden = x @ shared.gate_up.T
    torch.testing.assert_close(shared(x), (hidden * torch.sigmoid(hidden)) @ shared.down.T)


def test_ungated_experts_use_one_matrix():
    store, x = make_store(gated=False), randn(T, H)
    hidden = x @ store.gate_up[1].T
    torch.testing.assert_close(expert_output(x, store, 1), (hidden * torch.sigmoid(hidden)) @ store.down[1].T)


def test_sparsity_of_the_store_applies():
    x = randn(T, H)
    everything_out = make_store(sparsity=Sparsity({"hidden": SiteRule(1e9)}))
    routing = Routing.dense(torch.ones(T, 2))
    assert torch.count_nonzero(moe_forward(layer_of(everything_out), x, routing=routing)) == 0
    assert torch.count_nonzero(moe_forward(layer_of(make_store()), x, routing=routing)) > 0


def test_router_is_asked_with_the_context_unless_a_routing_is_given():
    routing = Routing.dense(torch.ones(T, 2))
    layer, x, ctx = layer_of(make_store(), routing=routing), randn(T, H), Context(layer=5)
    y = moe_forward(layer, x, ctx)
    assert layer.router.seen == [ctx]
    assert torch.equal(y, moe_forward(layer, x, routing=routing))
    assert len(layer.router.seen) == 1


@pytest.mark.parametrize("shared", [make_shared(), mixed(randn(2, H, seed=6))], ids=["sigmoid", "softmax2"])
def test_gradients_reach_input_gate_and_weights(shared):
    store, x = make_store(), randn(4, H)

    def forward(x, gate_TE, gate_up, down):
        inner = ExpertStore(gate_up, down, store.kinds)
        return moe_forward(layer_of(inner, shared), x, routing=Routing.dense(gate_TE))

    inputs = [t.clone().requires_grad_() for t in (x, randn(4, 2, seed=3), store.gate_up, store.down)]
    assert torch.autograd.gradcheck(forward, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_has_the_dtype_of_x_and_is_near_float64(dtype):
    store, x, routing = make_store(), randn(T, H), Routing.dense(randn(T, 2, seed=9))
    layer = layer_of(store, make_shared())
    y = moe_forward(layer, x.to(dtype), routing=routing)
    assert y.dtype == dtype
    wanted = moe_forward(layer, x, routing=routing)
    assert (y.double() - wanted).norm() < 20 * torch.finfo(dtype).eps * wanted.norm()


def test_no_tokens_give_an_empty_result():
    routing = Routing.dense(torch.zeros(0, 2))
    assert moe_forward(layer_of(make_store(), make_shared()), torch.zeros(0, H), routing=routing).shape == (0, H)


def test_layer_weights_know_whether_they_are_dense():
    assert LayerWeights(randn(2 * F, H), randn(H, F)).is_dense
    assert not LayerWeights(randn(2, 2 * F, H), randn(2, H, F)).is_dense
