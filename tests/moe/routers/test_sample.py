"""AdvMoE: one expert per image for all layers, whose score gets the gradient of the weight."""

import pytest
import torch

from moebench.contracts import Selection, load_attribute
from moebench.moe.layer import LayerWeights
from moebench.moe.router import select
from moebench.moe.router_params.sample import DESCRIPTORS, AdvMoE
from moebench.moe.routers.sample import BasicBlock, Convolution, StraightThrough
from moebench.moe.routing import Context
from moebench.moe.shapes import ModelShape

VARIANTS = [
    ("advmoe", AdvMoE(), {"experts": 2}),
    ("advmoe", AdvMoE(blocks=1), {}),
    ("advmoe", AdvMoE(blocks=1, released_mask=True), {}),
]
SHAPE = ModelShape(32, 8, 4, 3, (0, 1, 2), Selection("softmax", 2, True))
SMALL = AdvMoE(blocks=1)
SAMPLES, TOKENS = 6, 48
SEGMENT_T = torch.arange(TOKENS) * SAMPLES // TOKENS


def seeded(*size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


IMAGES = seeded(SAMPLES, 3, 16, 16, seed=2)


def build(params=SMALL, seed=0, **changes):
    shape = SHAPE.with_(**changes)
    weights = LayerWeights(torch.zeros(shape.experts, 16, 32), torch.zeros(shape.experts, 32, 8))
    return load_attribute(DESCRIPTORS[0].factory)(params)(weights, shape, seed)


def context(images=IMAGES, **changes):
    return Context(features=images, segment_T=SEGMENT_T, **changes)


@pytest.mark.parametrize(("params", "changes"), [variant[1:] for variant in VARIANTS if not variant[1].released_mask])
def test_an_image_has_one_expert_with_weight_one(params, changes):
    routing = build(params, **changes).router(seeded(TOKENS, 32), context())
    assert (routing.weight_N == 1).all()
    expert_ST = routing.padded()[0].view(SAMPLES, -1)
    assert (expert_ST == expert_ST[:, :1]).all()
    indices_TK, weights_TK = select(routing.logits_TE, params.selection(SHAPE))
    assert torch.equal(routing.padded()[0], indices_TK)
    assert torch.equal(routing.padded()[1], weights_TK)


def test_images_are_told_apart():
    images = seeded(64, 3, 16, 16)
    ctx = Context(features=images, segment_T=torch.arange(64))
    assert len(build().router(torch.zeros(64, 32), ctx).expert_N.unique()) > 1


def test_the_plan_is_one_routing_for_all_layers():
    router = build().router
    assert (router.scope, router.needs) == ("model", {"features", "segment_T"})
    plan = router.plan(torch.zeros(TOKENS, 32), context(), SHAPE.moe_layers)
    assert all(router(seeded(TOKENS, 32), Context(layer=layer, plan=plan)) is plan[0] for layer in SHAPE.moe_layers)


def test_the_gradient_goes_straight_through_to_the_selected_score():
    scores_TE = seeded(5, 4).requires_grad_()
    best_T1 = scores_TE.argmax(1, keepdim=True)
    weights_T1 = StraightThrough()(scores_TE, best_T1)
    assert torch.equal(weights_T1, torch.ones(5, 1))
    (weights_T1 * torch.arange(1.0, 6.0)[:, None]).sum().backward()
    assert torch.equal(scores_TE.grad, torch.zeros(5, 4).scatter(1, best_T1, torch.arange(1.0, 6.0)[:, None]))


def test_the_released_mask_reaches_the_scores_of_all_experts_at_their_cost():
    """The same output: the others weigh 0. The scores of all of them learn, and all of them are computed."""
    images = context(training=True)
    paths = (AdvMoE(blocks=1, released_mask=flag) for flag in (False, True))
    ours, released = (build(params).router(torch.zeros(TOKENS, 32), images) for params in paths)
    assert torch.equal(ours.to_dense(), released.to_dense())
    assert (ours.k_T == 1).all()
    assert (released.k_T == 4).all()
    params = AdvMoE(released_mask=True)
    assert (params.selection(SHAPE), params.max_k(SHAPE)) == (None, SHAPE.experts)
    reached = []
    for routing in (ours, released):
        (gradient_TE,) = torch.autograd.grad((routing.to_dense() * seeded(TOKENS, 4, seed=3)).sum(), routing.logits_TE)
        reached.append((gradient_TE != 0).sum(1))
    assert (reached[0] == 1).all()
    assert (reached[1] == 4).all()


def test_gradient_reaches_every_parameter():
    router = build().router
    routing = router(torch.zeros(TOKENS, 32), context(training=True))
    (routing.to_dense() * seeded(TOKENS, 4, seed=3)).sum().backward()
    for name, parameter in router.named_parameters():
        assert parameter.grad.abs().max() > 1e-6, name


def test_inference_looks_at_one_image_at_a_time():
    router = build().router
    whole_TE = router(torch.zeros(TOKENS, 32), context()).logits_TE
    changed = IMAGES.clone()
    changed[0] += 1
    other_TE = router(torch.zeros(TOKENS, 32), context(changed)).logits_TE
    first_T = SEGMENT_T == 0
    assert not torch.allclose(whole_TE[first_T], other_TE[first_T], atol=1e-3)
    torch.testing.assert_close(whole_TE[~first_T], other_TE[~first_T])


def test_batch_statistics_belong_to_training():
    router = build().router
    before_TE = router(torch.zeros(TOKENS, 32), context()).logits_TE
    assert torch.equal(router(torch.zeros(TOKENS, 32), context()).logits_TE, before_TE)
    trained_TE = router(torch.zeros(TOKENS, 32), context(training=True)).logits_TE
    assert not torch.allclose(trained_TE, before_TE, atol=1e-3)
    assert not torch.equal(router(torch.zeros(TOKENS, 32), context()).logits_TE, before_TE)


@pytest.mark.parametrize("stride", [1, 2])
def test_a_block_of_zeros_is_its_shortcut(stride):
    """The shortcut keeps every other pixel and puts the channels in the middle of zeros."""
    channels = 16 * stride
    block = BasicBlock(
        Convolution(torch.zeros(channels, 16, 3, 3), stride), Convolution(torch.zeros(channels, channels, 3, 3))
    ).eval()
    x_SCRW = seeded(2, 16, 8, 8).abs()
    y_SDRW = block(x_SCRW)
    start = (channels - 16) // 2
    assert torch.equal(y_SDRW[:, start : start + 16], x_SCRW[:, :, ::stride, ::stride])
    assert y_SDRW.count_nonzero() == y_SDRW[:, start : start + 16].count_nonzero()


def test_three_stages_of_three_blocks_are_a_resnet_20():
    router = build(AdvMoE(), experts=2).router
    convolutions = [module for module in router.modules() if isinstance(module, Convolution)]
    assert len(convolutions) == 19
    assert [len(module.weight_DC33) for module in convolutions] == [16] * 7 + [32] * 6 + [64] * 6
    assert [module.stride for module in convolutions if module.stride == 2] == [2, 2]


def test_seeds_make_routers():
    first, again, other = (build(seed=seed).router(torch.zeros(TOKENS, 32), context()).logits_TE for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": None}, "'features'"),
        ({"segment_T": None}, "'segment_T'"),
        ({"features": torch.zeros(SAMPLES, 1, 8, 8)}, "give images"),
        ({"features": torch.zeros(SAMPLES, 16)}, "give images"),
    ],
)
def test_every_token_needs_an_image(changes, message):
    ctx = Context(**{"features": IMAGES, "segment_T": SEGMENT_T, **changes})
    with pytest.raises(ValueError, match=message):
        build().router(torch.zeros(TOKENS, 32), ctx)


def test_invalid_tokens_and_no_tokens():
    valid_T = torch.arange(TOKENS) % 3 != 0
    assert torch.equal(build().router(torch.zeros(TOKENS, 32), context(valid_T=valid_T)).k_T, valid_T.long())
    ctx = Context(features=IMAGES, segment_T=torch.zeros(0).long())
    assert build().router(torch.zeros(0, 32), ctx).shape == (0, 4)


def test_parameters_are_checked():
    with pytest.raises(ValueError, match="blocks=0"):
        AdvMoE(blocks=0)
