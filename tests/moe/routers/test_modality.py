"""MoIIE and Uni-MoE: what a modality may see, and where the released code departs from the paper."""

import pytest
import torch

from moebench.contracts import Selection, load_attribute
from moebench.moe.layer import LayerWeights
from moebench.moe.router import Linear, Pipeline, Softmax, TopK, select
from moebench.moe.router_context import ContextPipeline, PerContext, visible_experts
from moebench.moe.router_params.modality import DESCRIPTORS, MoIIE, UniMoE
from moebench.moe.routers.modality import shrink_images
from moebench.moe.routing import Context
from moebench.moe.shapes import ModelShape

VARIANTS = [
    ("moiie", MoIIE(), {}),
    ("moiie", MoIIE(), {"experts": 4}),
    ("moiie", MoIIE(k=3, released_ids=True), {}),
    ("uni_moe", UniMoE(), {}),
]
SHAPE = ModelShape(32, 8, 8, 2, (0, 1), Selection("softmax", 2, True))
TOKENS = 64
LANGUAGE, VISION = 0, 1
MODALITY_T = (torch.arange(TOKENS) // 16) % 2


def seeded(*size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def build(name, params, seed=0, router_EH=None, **changes):
    shape = SHAPE.with_(**changes)
    weights = LayerWeights(torch.zeros(shape.experts, 16, 32), torch.zeros(shape.experts, 32, 8), router_EH)
    factory = next(descriptor.factory for descriptor in DESCRIPTORS if descriptor.name == name)
    return load_attribute(factory)(params)(weights, shape, seed)


def used(routing, chosen_T):
    return routing.to_dense()[chosen_T].gt(0).any(0).nonzero().flatten().tolist()


def test_no_modality_reaches_the_experts_of_the_other():
    routing = build("moiie", MoIIE()).router(seeded(TOKENS, 32), Context(modality_T=MODALITY_T))
    assert used(routing, MODALITY_T == VISION) == [0, 1, 2, 3, 4, 5]
    assert used(routing, MODALITY_T == LANGUAGE) == [2, 3, 4, 5, 6, 7]
    assert (routing.probs_TE[MODALITY_T == VISION][:, 6:] == 0).all()


@pytest.mark.parametrize("experts", [4, 8, 16])
def test_each_gate_is_mixtral_over_what_it_sees(experts):
    router = build("moiie", MoIIE(), experts=experts).router
    x_TH = seeded(TOKENS, 32)
    routing = router(x_TH, Context(modality_T=MODALITY_T))
    quarter = experts // 4
    for modality, seen in ((VISION, slice(0, 3 * quarter)), (LANGUAGE, slice(quarter, experts))):
        logits_TV = x_TH @ router.scorer.weight_GEH[modality, seen].T
        best = logits_TV.topk(2)
        expected_TE = torch.zeros(TOKENS, experts)
        expected_TE[:, seen] = torch.zeros_like(logits_TV).scatter(1, best.indices, best.values.softmax(-1))
        chosen_T = modality == MODALITY_T
        torch.testing.assert_close(routing.to_dense()[chosen_T], expected_TE[chosen_T])


def test_tied_gates_that_see_everything_are_mixtral():
    rows_EH, x_TH = seeded(8, 32, seed=3), seeded(TOKENS, 32)
    scorer = PerContext("modality_T", torch.stack([rows_EH, rows_EH]), visible_experts(8, [range(8)] * 2))
    tied = ContextPipeline(scorer, TopK(2), Softmax(True), {"modality_T"})
    mixtral = Pipeline(Linear(rows_EH), TopK(2), Softmax(True))
    both = tied(x_TH, Context(modality_T=MODALITY_T)), mixtral(x_TH, Context())
    assert torch.equal(both[0].expert_N, both[1].expert_N)
    torch.testing.assert_close(both[0].weight_N, both[1].weight_N)


def test_selection_holds_for_the_logits():
    routing = build("moiie", MoIIE()).router(seeded(TOKENS, 32), Context(modality_T=MODALITY_T))
    indices_TK, weights_TK = select(routing.logits_TE, MoIIE().selection(SHAPE))
    assert torch.equal(routing.padded()[0], indices_TK)
    assert torch.equal(routing.padded()[1], weights_TK)


def test_shared_experts_carry_twice_the_load():
    """Both modalities spread over six experts each, of which four are the same."""
    routing = build("moiie", MoIIE()).router(seeded(8000, 32), Context(modality_T=torch.arange(8000) % 2))
    load_E = routing.counts_E.double()
    assert load_E[2:6].mean() / load_E[[0, 1, 6, 7]].mean() == pytest.approx(2.0, rel=0.25)


def test_released_ids_are_right_for_four_experts_and_leave_the_last_unused_for_more():
    x_TH, ctx = seeded(2000, 32), Context(modality_T=torch.arange(2000) % 2)
    for experts in (4, 8):
        paper, released = (
            build("moiie", MoIIE(released_ids=flag), experts=experts).router(x_TH, ctx) for flag in (False, True)
        )
        assert torch.equal(paper.to_dense(), released.to_dense()) == (experts == 4)
        assert (paper.counts_E > 0).all()
        assert bool(released.counts_E[-1] > 0) == (experts == 4)


def test_released_boundary_sends_the_last_image_token_to_language():
    assert shrink_images(torch.tensor([0, 1, 1, 1, 0, 1, 0, 1, 1])).tolist() == [0, 1, 1, 0, 0, 0, 0, 1, 1]
    assert shrink_images(torch.zeros(0).long()).tolist() == []
    x_TH, ctx = seeded(TOKENS, 32), Context(modality_T=MODALITY_T)
    paper = build("moiie", MoIIE()).router
    released = build("moiie", MoIIE(released_boundary=True)).router
    differ_T = (paper(x_TH, ctx).to_dense() != released(x_TH, ctx).to_dense()).any(1)
    assert differ_T.nonzero().flatten().tolist() == [31]
    assert (paper.causal, released.causal) == (True, False)


def test_gates_start_as_the_layers_router_and_learn_apart():
    router_EH = seeded(8, 32, seed=4)
    router = build("moiie", MoIIE(), router_EH=router_EH).router
    assert torch.equal(router.scorer.weight_GEH, torch.stack([router_EH, router_EH]))
    only_vision = Context(modality_T=torch.ones(TOKENS).long())
    router(seeded(TOKENS, 32), only_vision).weight_N.square().sum().backward()
    gradient_GEH = router.scorer.weight_GEH.grad
    assert gradient_GEH[VISION, :6].abs().amax() > 1e-5
    assert (gradient_GEH[LANGUAGE] == 0).all()
    assert (gradient_GEH[VISION, 6:] == 0).all()


def test_uni_moe_is_softmax_over_its_two_largest_logits():
    router_EH, x_TH = seeded(8, 32, seed=4), seeded(TOKENS, 32)
    routing = build("uni_moe", UniMoE(), router_EH=router_EH).router(x_TH, Context())
    best = (x_TH @ router_EH.T).topk(2)
    assert torch.equal(routing.padded()[0], best.indices)
    torch.testing.assert_close(routing.padded()[1], best.values.softmax(-1))


@pytest.mark.parametrize("released_boundary", [False, True])
def test_an_absent_modality_is_named(released_boundary):
    router = build("moiie", MoIIE(released_boundary=released_boundary)).router
    with pytest.raises(ValueError, match="'modality_T'"):
        router(seeded(TOKENS, 32), Context())


@pytest.mark.parametrize(("k", "experts", "message"), [(2, 6, "quarters"), (7, 8, "the 6 experts")])
def test_impossible_parameters_are_refused(k, experts, message):
    with pytest.raises(ValueError, match=message):
        MoIIE(k=k).selection(SHAPE.with_(experts=experts))
