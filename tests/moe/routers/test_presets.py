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
    TimeMoE,
)
from moebench.moe.router_params.shared import SharedRule
from moebench.moe.routing import Context
from moebench.moe.shapes import ModelShape

VARIANTS = [
    ("dit_moe", DiTMoE(), {}),
    ("time_moe", TimeMoE(), {}),
    ("moe_llava", MoELLaVA(), {"experts": 4}),
    ("robust_qa", RobustQA(), {}),
    ("robust_qa", RobustQA(gate="sequence"), {}),
    ("pr_moe", PRMoE(), {}),
]
SHAPE = ModelShape(32, 8, 16, 2, (0, 1), Selection("sigmoid", 4, True, 2.5))
TOKENS = 48


def seeded(*size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def build(name, params, shared=None, gated=True, **changes):
    shape = SHAPE.with_(**changes)
    rows = 16 if gated else 8
    weights = LayerWeights(
        torch.zeros(shape.experts, rows, 32), torch.zeros(shape.experts, 32, 8), shared=shared, gated=gated
    )
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
    routing = build(name, params, **changes).router(seeded(TOKENS, 32), Context(segment_T=torch.arange(TOKENS) // 6))
    indices_TK, weights_TK = select(routing.logits_TE, params.selection(SHAPE))
    assert torch.equal(routing.padded()[0], indices_TK)
    assert torch.equal(routing.padded()[1], weights_TK)
    sum_T = routing.to_dense().sum(1)
    assert (sum_T < 0.999).all() == (not renormalize)


def test_every_preset_is_here():
    assert {descriptor.name for descriptor in DESCRIPTORS} == {name for name, _, _ in VARIANTS} == set(RULES)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("name", RULES)
def test_the_shared_rule_becomes_a_shared_expert(name, gated):
    rule = RULES[name][2]
    shared = build(name, next(params for key, params, _ in VARIANTS if key == name), gated=gated).shared
    if rule is None:
        assert shared is None
        return
    width = int(rule.width * SHAPE.width)
    assert tuple(shared.gate_up.shape) == ((2 if gated else 1) * width, SHAPE.hidden)
    assert tuple(shared.down.shape) == (SHAPE.hidden, width)
    assert ((shared.gate_H is not None), (shared.mix_2H is not None)) == (
        rule.gate == "sigmoid",
        rule.gate == "softmax2",
    )
    assert shared.gated == gated
    x_TH = seeded(4000, 32)
    assert float(shared(x_TH).square().mean()) > 0.01, "the shared expert says next to nothing"
    own = SharedExpert(seeded(4, 32), seeded(32, 2))
    assert build(name, PRMoE(), shared=own).shared is None


def test_the_released_dit_moe_has_narrower_shared_experts():
    """2H where a routed expert has 4H, both shared ones together; the paper's two have 8H."""
    ours, released = (build("dit_moe", DiTMoE(released_width=flag)).shared for flag in (False, True))
    assert ours.down.shape[1] == 2 * SHAPE.width
    assert released.down.shape[1] == SHAPE.width // 2
    with pytest.raises(ValueError, match=r"0\.5 times 7 channels"):
        SharedRule(0.5).channels(7)


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


# --- Robust QA's gate ------------------------------------------------------------------------------------------------

SEQUENCES = torch.tensor([7] * 10 + [3] * 8 + [7] * 5 + [4])
"""Sequence 7 comes in two pieces; one sequence is a token alone."""


def sequence_gate():
    return build("robust_qa", RobustQA(gate="sequence")).router


def test_a_sequence_follows_the_gate_of_its_first_token():
    x_TH, router = seeded(24, 32), sequence_gate()
    token = build("robust_qa", RobustQA()).router(x_TH, Context())
    routing = router(x_TH, Context(segment_T=SEQUENCES))
    assert (router.needs, router.causal) == ({"segment_T"}, True)
    first_T = torch.tensor([0] * 10 + [10] * 8 + [0] * 5 + [23])
    assert torch.equal(routing.expert_N, token.expert_N[first_T])
    torch.testing.assert_close(routing.to_dense(), token.to_dense()[first_T])
    torch.testing.assert_close(routing.logits_TE, token.logits_TE[first_T])
    assert len(set(token.expert_N.tolist())) > 3, "tokens on their own choose otherwise"


def test_only_the_first_token_decides_so_that_their_order_matters():
    x_TH, router = seeded(24, 32), sequence_gate()
    before_TE = router(x_TH, Context(segment_T=SEQUENCES)).to_dense()
    moved_TH = x_TH.clone()
    moved_TH[1:10] += 1
    assert torch.equal(router(moved_TH, Context(segment_T=SEQUENCES)).to_dense(), before_TE)
    backwards_TE = router(x_TH.flip(0), Context(segment_T=SEQUENCES.flip(0))).to_dense()
    assert not torch.equal(backwards_TE.flip(0), before_TE)


def test_padding_before_a_sequence_is_not_its_first_token():
    valid_T = torch.arange(24) >= 3
    x_TH, router = seeded(24, 32), sequence_gate()
    routing = router(x_TH, Context(segment_T=SEQUENCES, valid_T=valid_T))
    assert not routing.k_T[:3].any()
    alone = router(x_TH[3:], Context(segment_T=SEQUENCES[3:]))
    assert torch.equal(routing.to_dense()[3:], alone.to_dense())


def test_a_gate_by_sequence_needs_sequences_and_takes_none():
    with pytest.raises(ValueError, match="'segment_T'"):
        sequence_gate()(seeded(24, 32), Context())
    assert sequence_gate()(torch.zeros(0, 32), Context(segment_T=SEQUENCES[:0])).shape == (0, 16)


def test_the_gate_by_sequence_learns_from_all_its_tokens():
    x_TH, router = seeded(24, 32), sequence_gate()
    router(x_TH, Context(segment_T=SEQUENCES)).weight_N.sum().backward()
    assert float(router.scorer.scorer.weight_EH.grad.abs().max()) > 1e-5


def test_padding_of_the_question_takes_no_capacity():
    valid_T = torch.arange(TOKENS) < 30
    routing = build("robust_qa", RobustQA()).router(seeded(TOKENS, 32), Context(valid_T=valid_T))
    assert int(routing.counts_E.sum()) == 30
