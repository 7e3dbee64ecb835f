"""MoFME: weights in units of their uncertainty (R23), and experts that modulate features (R18)."""

from dataclasses import replace

import pytest
import torch

from moebench.contracts import Selection, load_attribute
from moebench.moe.layer import LayerWeights
from moebench.moe.router import select
from moebench.moe.router_params.mofme import DESCRIPTORS, MoFME
from moebench.moe.routers.mofme import VARIANCE_FLOOR, film_apart, film_merged
from moebench.moe.routing import Context
from moebench.moe.shapes import ModelShape

VARIANTS = [
    ("mofme", MoFME(), {}),
    ("mofme", MoFME(k=3, passes=8, dropout=0.5), {}),
    ("mofme", MoFME(dropout=0.0), {}),
]
SHAPE = ModelShape(32, 8, 8, 2, (0, 1), Selection("softmax", 2, True))
TOKENS = 64


def seeded(*size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


ROUTER_EH = seeded(8, 32, seed=4) / 32**0.5


def build(params):
    weights = LayerWeights(torch.zeros(8, 16, 32), torch.zeros(8, 32, 8), ROUTER_EH)
    return load_attribute(DESCRIPTORS[0].factory)(params)(weights, SHAPE, 0)


def training(seed=0, **changes):
    return Context(training=True, rng=torch.Generator().manual_seed(seed), **changes)


@pytest.mark.parametrize("params", [variant[1] for variant in VARIANTS])
def test_inference_is_softmax_over_the_selected_logits(params):
    x_TH = seeded(TOKENS, 32)
    routing = build(params).router(x_TH, Context())
    best = (x_TH @ ROUTER_EH.T).topk(params.k)
    assert torch.equal(routing.padded()[0], best.indices)
    torch.testing.assert_close(routing.padded()[1], best.values.softmax(-1))
    indices_TK, weights_TK = select(routing.logits_TE, params.selection(SHAPE))
    assert torch.equal(routing.padded()[0], indices_TK)
    assert torch.equal(routing.padded()[1], weights_TK)


def test_training_weights_by_hand():
    params = MoFME(passes=6, dropout=0.25)
    x_TH = seeded(TOKENS, 32)
    routing = build(params).router(x_TH, training(5))
    rng = torch.Generator().manual_seed(5)
    passes = []
    for _ in range(6):
        kept_TH = torch.rand(x_TH.shape, generator=rng) >= 0.25
        indices_TK, weights_TK = select((x_TH * kept_TH / 0.75) @ ROUTER_EH.T, params.selection(SHAPE))
        passes.append(torch.zeros(TOKENS, 8).scatter(1, indices_TK, weights_TK))
    gate_MTE = torch.stack(passes)
    indices_TK, weights_TK = select(x_TH @ ROUTER_EH.T, params.selection(SHAPE))
    mean_TK, variance_TK = gate_MTE.mean(0).gather(1, indices_TK), gate_MTE.var(0).gather(1, indices_TK)
    assert torch.equal(routing.padded()[0], indices_TK)
    expected_TK = (weights_TK - mean_TK) / (variance_TK + VARIANCE_FLOOR).sqrt()
    torch.testing.assert_close(routing.padded()[1], expected_TK, atol=1e-4, rtol=1e-4)


def test_without_dropout_the_released_router_has_no_weights():
    """R23: passes that are all the same leave r - mean = 0 to rounding (6e-8); with dropout they do not."""
    x_TH = seeded(TOKENS, 32)
    released = build(MoFME(dropout=0.0)).router(x_TH, training())
    paper = build(MoFME()).router(x_TH, training())
    deviation = released.weight_N.abs().max() * VARIANCE_FLOOR**0.5
    assert deviation < 2e-7
    assert paper.weight_N.abs().mean() > 0.1
    assert (paper.weight_N < 0).any()
    assert torch.equal(released.expert_N, paper.expert_N)


def test_the_generator_is_needed_for_dropout_in_training_only():
    x_TH = seeded(TOKENS, 32)
    with pytest.raises(ValueError, match="'rng'"):
        build(MoFME()).router(x_TH, Context(training=True))
    build(MoFME(dropout=0.0)).router(x_TH, Context(training=True))
    first, again, other = (build(MoFME()).router(x_TH, training(seed)).weight_N for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_gradient_is_that_of_the_router_over_its_uncertainty():
    bundle, x_TH = build(MoFME(dropout=0.0)), seeded(TOKENS, 32)
    gradients = []
    for ctx in (Context(), training()):
        bundle.router.zero_grad()
        (bundle.router(x_TH, ctx).to_dense() * seeded(TOKENS, 8, seed=3)).sum().backward()
        gradients.append(bundle.router.scorer.weight_EH.grad.clone())
    assert gradients[0].abs().max() > 1e-3
    torch.testing.assert_close(gradients[1], gradients[0] / VARIANCE_FLOOR**0.5, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("ctx", [Context(), training()], ids=["inference", "training"])
def test_invalid_tokens_and_no_tokens(ctx):
    valid_T = torch.arange(TOKENS) % 3 != 0
    router = build(MoFME()).router
    assert torch.equal(router(seeded(TOKENS, 32), replace(ctx, valid_T=valid_T)).k_T, 2 * valid_T.long())
    assert router(torch.zeros(0, 32), ctx).shape == (0, 8)


@pytest.mark.parametrize(("changes", "message"), [({"passes": 1}, "passes=1"), ({"dropout": 1.0}, "dropout=1.0")])
def test_parameters_are_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        MoFME(**changes)


# --- R18 -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ctx", [Context(), training()], ids=["inference", "training"])
def test_mixing_the_maps_first_is_mixing_the_outputs(ctx):
    """R18: 1.7e-7 of the largest output (2.5e-7 in the prototype), with signed weights in training too."""
    h_TH = seeded(TOKENS, 32)
    scale_EHH, shift_EHH = seeded(8, 32, 32, seed=5) / 32**0.5, seeded(8, 32, 32, seed=6) / 32**0.5
    routing = build(MoFME()).router(h_TH, ctx)
    apart_TH = film_apart(h_TH, scale_EHH, shift_EHH, routing)
    merged_TH = film_merged(h_TH, scale_EHH, shift_EHH, routing)
    assert (apart_TH - merged_TH).abs().max() < 2e-6 * apart_TH.abs().max()


def test_experts_that_are_diagonal_have_few_weights():
    """E pairs of vectors against E two-layer FFNs of width 4H: 2 E H against 8 E H^2."""
    hidden = 32
    shape = SHAPE.with_(width=4 * hidden, gated=False)
    assert 2 * shape.experts * hidden * 4 * hidden == shape.expert_bytes(1)
