"""Named top-k systems: their rule, what they keep always on, and the sizes that follow (R21)."""

import pytest
import torch

from moebench.contracts import Selection, load_attribute
from moebench.moe.layer import LayerWeights, SharedExpert, ffn_hidden
from moebench.moe.router import select
from moebench.moe.router_params.presets import (
    DESCRIPTORS,
    DiTMoE,
    MoELLaVA,
    PRMoE,
    RobustQA,
    SharedRule,
    TimeMoE,
)
from moebench.moe.routing import Context
from moebench.moe.shapes import ModelShape

VARIANTS = [
    ("dit_moe", DiTMoE(), {}),
    ("time_moe", TimeMoE(), {}),
    ("moe_llava", MoELLaVA(), {"experts": 4}),
    ("robust_qa", RobustQA(), {}),
    ("pr_moe", PRMoE(), {}),
]
SHAPE = ModelShape(32, 8, 16, 2, (0, 1), Selection("sigmoid", 4, True, 2.5))
TOKENS = 48


def seeded(*size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def build(name, params, **changes):
    shape = SHAPE.with_(**changes)
    weights = LayerWeights(torch.zeros(shape.experts, 16, 32), torch.zeros(shape.experts, 32, 8))
    factory = next(descriptor.factory for descriptor in DESCRIPTORS if descriptor.name == name)
    return load_attribute(factory)(params)(weights, shape, 0)


RULES = {
    "dit_moe": (2, False, SharedRule(2.0, "none")),
    "time_moe": (2, False, SharedRule(2.0, "sigmoid")),
    "moe_llava": (2, True, None),
    "robust_qa": (1, False, None),
    "pr_moe": (1, False, SharedRule(1.0, "softmax2")),
}


@pytest.mark.parametrize(("name", "params", "changes"), VARIANTS)
def test_the_rule_is_the_systems_and_not_the_models(name, params, changes):
    k, renormalize, shared = RULES[name]
    assert params.selection(SHAPE) == Selection("softmax", k, renormalize)
    assert (params.shared, params.max_k(SHAPE)) == (shared, k)
    routing = build(name, params, **changes).router(seeded(TOKENS, 32), Context())
    indices_TK, weights_TK = select(routing.logits_TE, params.selection(SHAPE))
    assert torch.equal(routing.padded()[0], indices_TK)
    assert torch.equal(routing.padded()[1], weights_TK)
    sum_T = routing.to_dense().sum(1)
    assert (sum_T < 0.999).all() == (not renormalize)


def test_every_preset_is_here():
    assert {descriptor.name for descriptor in DESCRIPTORS} == {name for name, _, _ in VARIANTS} == set(RULES)


def test_too_many_experts_are_refused():
    with pytest.raises(ValueError, match="the 16 experts"):
        DiTMoE(k=17).selection(SHAPE)


def test_pyramid_and_residual_shrink_the_experts():
    """R21: 12 MoE layers of 1.3B + MoE-128 hold 51.5 B expert parameters; PR-MoE, residual FFNs included, 30.5 B."""
    hidden = 2048
    shape = ModelShape(hidden, 4 * hidden, 128, 24, tuple(range(1, 24, 2)), SHAPE.selection, gated=False)
    standard = len(shape.moe_layers) * shape.expert_bytes(1)
    pyramid = sum(shape.with_(experts=experts).expert_bytes(1) for experts in PRMoE.PYRAMIDS["1.3B"])
    residual = len(shape.moe_layers) * shape.with_(experts=1).expert_bytes(1) * PRMoE().shared.width
    assert len(PRMoE.PYRAMIDS["1.3B"]) == len(PRMoE.PYRAMIDS["350M"]) == len(shape.moe_layers)
    assert round(standard / 1e9, 1) == 51.5
    assert round((pyramid + residual) / 1e9, 1) == 30.5


@pytest.mark.parametrize("k", [1, 2, 4])
def test_time_moe_has_as_many_active_channels_whatever_its_k(k):
    """Experts of width F / k: k of them and the shared one are 2F."""
    width = 64
    params = TimeMoE(k=k)
    assert (k + params.shared.width) * (width / k) == 2 * width


def test_a_sigmoid_gate_of_zero_halves_the_shared_expert():
    x_TH, gate_up, down = seeded(TOKENS, 32), seeded(32, 32, seed=1), seeded(32, 16, seed=2)
    half_TH = SharedExpert(gate_up, down, torch.zeros(32))(x_TH)
    torch.testing.assert_close(half_TH, ffn_hidden(x_TH, gate_up, "silu") @ down.T / 2)


def test_padding_of_the_question_takes_no_capacity():
    valid_T = torch.arange(TOKENS) < 30
    routing = build("robust_qa", RobustQA()).router(seeded(TOKENS, 32), Context(valid_T=valid_T))
    assert int(routing.counts_E.sum()) == 30
