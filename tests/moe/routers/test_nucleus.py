"""Top-p: the fewest experts that hold a share of the probability."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moebench.contracts import Selection, load_attribute
from moebench.moe.layer import LayerWeights
from moebench.moe.router_params.nucleus import DESCRIPTORS, TopP
from moebench.moe.routers.nucleus import nucleus
from moebench.moe.routing import Context
from moebench.moe.shapes import ModelShape

VARIANTS = [
    ("top_p", TopP(), {}),
    ("top_p", TopP(p=0.9), {}),
    ("top_p", TopP(p=0.7, renormalize=False), {}),
    ("top_p", TopP(p=1.0), {"experts": 5}),
]
HIDDEN, EXPERTS, TOKENS = 32, 16, 48
SHAPE = ModelShape(HIDDEN, 8, EXPERTS, 2, (0, 1), Selection("softmax", 2, True))
every_variant = pytest.mark.parametrize("params", [variant[1] for variant in VARIANTS])
shares = st.floats(0.01, 1.0)


def seeded(*size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def build(params, seed=0, router_EH=None):
    weights = LayerWeights(torch.zeros(1), torch.zeros(1), router_EH)
    return load_attribute(DESCRIPTORS[0].factory)(params)(weights, SHAPE, seed)


@settings(deadline=None, max_examples=100)
@given(share=shares, scale=st.floats(0.0, 5.0), experts=st.integers(1, 12), seed=st.integers(0, 99))
def test_it_is_the_smallest_set_that_holds_the_share(share, scale, experts, seed):
    probs_TE = (scale * seeded(6, experts, seed=seed).double()).softmax(-1)
    keep_TE = nucleus(probs_TE, share)
    held_T = (probs_TE * keep_TE).sum(1)
    least_T = probs_TE.masked_fill(~keep_TE, 2.0).amin(1)
    assert (held_T >= share - 1e-9).all(), "the kept do not hold the share"
    assert (held_T - least_T < share + 1e-9).all(), "the last one kept was not needed"
    assert (probs_TE.masked_fill(keep_TE, 0.0).amax(1) <= least_T).all(), "a better one was left out"


@settings(deadline=None, max_examples=100)
@given(share=shares, experts=st.integers(1, 200))
def test_even_probabilities_need_the_most_experts_and_no_more(share, experts):
    probs_TE = torch.zeros(1, experts).softmax(-1)
    most = TopP(p=share).max_k(SHAPE.with_(experts=experts))
    assert most == min(math.ceil(share * experts), experts)
    assert most - 1 <= int(nucleus(probs_TE, share).sum()) <= most


@pytest.mark.parametrize(("share", "mean"), [(0.5, 2.37), (0.7, 4.04), (0.9, 7.84)])
def test_mean_number_of_experts(share, mean):
    """z ~ N(0, 1.5^2), 16 experts: the figures of the prototype."""
    keep_TE = nucleus((1.5 * seeded(40_000, EXPERTS)).softmax(-1), share)
    assert float(keep_TE.sum(1).double().mean()) == pytest.approx(mean, abs=0.05)


@every_variant
def test_weights_are_the_probabilities_or_their_part(params):
    routing = build(params).router(seeded(TOKENS, HIDDEN), Context())
    gate_TE, probs_TE = routing.to_dense(), routing.probs_TE
    expected_TE = probs_TE * (gate_TE > 0)
    held_T1 = expected_TE.sum(1, keepdim=True)
    torch.testing.assert_close(gate_TE, expected_TE / held_T1 if params.renormalize else expected_TE)
    assert (held_T1 >= params.p - 1e-6).all()
    assert 1 <= int(routing.k_T.min()) <= int(routing.k_T.max()) <= params.max_k(SHAPE)


def test_the_released_weights_are_not_renormalised():
    """BlockFFN's comparison renormalises, the code of the paper itself does not; the choice is the same."""
    x_TH = seeded(TOKENS, HIDDEN)
    ours, released = (build(TopP(renormalize=flag)).router(x_TH, Context()) for flag in (True, False))
    assert torch.equal(ours.expert_N, released.expert_N)
    torch.testing.assert_close(ours.to_dense().sum(1), torch.ones(TOKENS))
    sum_T = released.to_dense().sum(1)
    assert 0.4 - 1e-6 <= float(sum_T.detach().min()) < float(sum_T.detach().mean()) < 0.7


@every_variant
def test_invalid_tokens_have_no_entries(params):
    valid_T = torch.arange(TOKENS) % 3 != 0
    router, x_TH = build(params).router, seeded(TOKENS, HIDDEN)
    routing = router(x_TH, Context(valid_T=valid_T))
    assert not routing.k_T[~valid_T].any()
    assert torch.equal(routing.to_dense()[valid_T], router(x_TH, Context()).to_dense()[valid_T])
    assert router(x_TH[:0], Context()).shape == (0, EXPERTS)


@pytest.mark.parametrize("p", [0.0, 1.1, -0.5])
def test_a_share_that_is_none_is_refused(p):
    with pytest.raises(ValueError, match="lie in"):
        TopP(p=p)
