"""MoE++: the two options that do what its released code does and its paper does not say."""

import dataclasses

import pytest
import torch

from moebench.contracts import Selection, load_attribute
from moebench.moe.layer import LayerWeights, moe_forward
from moebench.moe.plugins import DESCRIPTORS, MoEPlusPlus
from moebench.moe.recipe import Recipe, Stage, prepare_layer
from moebench.moe.routers.moepp import UnitSoftmax
from moebench.moe.routing import Context, Routing
from moebench.moe.shapes import ModelShape

VARIANTS = [
    ("moepp", MoEPlusPlus(released_inputs=True), {}),
    ("moepp", MoEPlusPlus(unit_logits=True), {}),
]
HIDDEN, EXPERTS, TOKENS = 32, 8, 48
SHAPE = ModelShape(HIDDEN, 8, EXPERTS, 2, (0, 1), Selection("softmax", 2, True))
OF = {(descriptor.kind, descriptor.name): descriptor for descriptor in DESCRIPTORS}


def seeded(*size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def weights():
    return LayerWeights(seeded(EXPERTS, 16, HIDDEN, seed=40) / 6, seeded(EXPERTS, HIDDEN, 8, seed=41))


def build(params):
    return load_attribute(OF["routing", "moepp"].factory)(params)(weights(), SHAPE, 0)


def prepared(params, source):
    """The layer of MoE++ and no other stage."""
    stages = {kind: OF[kind, "none"] for kind in ("structure", "quantization", "sparsity")}
    recipe = Recipe(
        routing=Stage(OF["routing", "moepp"], params),
        **{kind: Stage(descriptor, descriptor.params()) for kind, descriptor in stages.items()},
    )
    return prepare_layer(recipe, source, SHAPE, seeded(TOKENS, HIDDEN), 0, torch.float32, {}, None)


@pytest.mark.parametrize("constant", [0, 2])
@pytest.mark.parametrize("k", [2, 3])
def test_released_inputs_are_k_times_what_every_expert_reads(k, constant):
    """y = sum_e w_e f_e(k x) for every kind; that is not k y, as neither FFNs nor constants are linear."""
    params, source, x_TH = MoEPlusPlus(k, 2, 4, constant, residual=False), weights(), seeded(TOKENS, HIDDEN, seed=1)
    plain, released = (prepared(dataclasses.replace(params, released_inputs=flag), source) for flag in (False, True))
    routing = plain.router(x_TH, Context())
    kinds = {"ffn", "copy", "constant"} if constant else {"ffn", "copy"}
    assert {plain.store.kinds[expert] for expert in routing.expert_N.tolist()} == kinds
    expected_TH = moe_forward(plain, k * x_TH, routing=routing)
    torch.testing.assert_close(moe_forward(released, x_TH), expected_TH, rtol=1e-5, atol=1e-5)
    for times in (1, k):
        assert not torch.allclose(expected_TH, times * moe_forward(plain, x_TH), rtol=0.05)
    assert plain.store.gate_up is source.gate_up


def test_released_inputs_leave_choice_and_shares_alone():
    x_TH = seeded(TOKENS, HIDDEN, seed=1)
    plain, released = (build(MoEPlusPlus(residual=False, released_inputs=flag)) for flag in (False, True))
    one, other = (bundle.router(x_TH, Context()) for bundle in (plain, released))
    assert torch.equal(one.expert_N, other.expert_N)
    ffn_N = one.expert_N < EXPERTS
    assert torch.equal(one.weight_N[ffn_N], other.weight_N[ffn_N])
    assert torch.equal(2 * one.weight_N[~ffn_N], other.weight_N[~ffn_N])
    assert (plain.input_scale, released.input_scale) == (1.0, 2.0)


def test_unit_logits_have_deviation_one_and_the_residual_carries_raw_ones():
    x_TH, prev_TE = 20 * seeded(TOKENS, HIDDEN, seed=1), seeded(TOKENS, EXPERTS + 4, seed=9)
    ctx = Context(prev=Routing.dense(torch.zeros(TOKENS, EXPERTS + 4), prev_TE))
    plain, unit = (build(MoEPlusPlus(unit_logits=flag)).router(x_TH, ctx) for flag in (False, True))
    assert torch.equal(unit.logits_TE, plain.logits_TE)
    expected_TE = (plain.logits_TE / plain.logits_TE.std(1, keepdim=True)).softmax(1)
    torch.testing.assert_close(unit.probs_TE, expected_TE)
    surest = [float(routing.probs_TE.detach().amax(1).mean()) for routing in (unit, plain)]
    assert surest[0] < 0.6 < 0.9 < surest[1], "logits of deviation 20 are certain, those of deviation 1 are not"


def test_equal_logits_stay_equal_where_there_is_no_deviation():
    logits_TE = torch.zeros(2, 4, requires_grad=True)
    scores_TE = UnitSoftmax().scores(logits_TE)
    assert torch.equal(scores_TE, torch.full((2, 4), 0.25))
    scores_TE[:, 0].sum().backward()
    assert torch.isfinite(logits_TE.grad).all()
