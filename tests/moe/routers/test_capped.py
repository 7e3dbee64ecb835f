"""Top-k with a capacity; the policies themselves are tested in test_capacity.py."""

import pytest
import torch

from moebench.contracts import Selection, load_attribute
from moebench.moe.layer import LayerWeights
from moebench.moe.router_params.capped import DESCRIPTORS, Capped
from moebench.moe.routing import Context
from moebench.moe.shapes import ModelShape

VARIANTS = [
    ("capped", Capped(), {}),
    ("capped", Capped(k=2, factor=1.0, policy="probs"), {}),
    ("capped", Capped(k=2, factor=1.0, policy="random"), {}),
    ("capped", Capped(k=2, factor=0.5, first_choices=True, share=True), {}),
]
TOKENS = 256
SHAPE = ModelShape(32, 8, 16, 2, (0, 1), Selection("softmax", 2, True))


def seeded(*size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def route(params, x_TH=None):
    weights = LayerWeights(torch.zeros(16, 16, 32), torch.zeros(16, 32, 8), seeded(16, 32, seed=4))
    router = load_attribute(DESCRIPTORS[0].factory)(params)(weights, SHAPE, 0).router
    ctx = Context(rng=torch.Generator().manual_seed(5))
    return router(seeded(TOKENS, 32, seed=1) if x_TH is None else x_TH, ctx)


def test_no_expert_takes_more_than_its_capacity_and_a_wide_one_drops_nothing():
    for policy in ("position", "probs", "random"):
        tight = route(Capped(k=2, factor=1.0, policy=policy))
        assert tight.counts_E.max() == 2 * TOKENS // 16
        assert len(tight.token_N) < 2 * TOKENS
        assert torch.equal(route(Capped(k=2, factor=16.0, policy=policy)).k_T, torch.full((TOKENS,), 2))


def test_policies_keep_different_tokens_where_an_expert_is_full():
    kept = {policy: route(Capped(factor=1.0, policy=policy)).k_T for policy in ("position", "probs", "random")}
    assert not torch.equal(kept["position"], kept["probs"])
    assert not torch.equal(kept["position"], kept["random"])
    assert kept["position"][: TOKENS // 4].sum() > kept["position"][-TOKENS // 4 :].sum()


def test_shared_weight_of_dropped_entries_goes_to_the_kept_ones():
    plain, shared = (route(Capped(k=2, factor=1.0, share=share)) for share in (False, True))
    assert torch.equal(plain.k_T, shared.k_T)
    half_T = plain.k_T == 1
    assert half_T.any()
    assert (shared.to_dense().sum(1)[half_T] > plain.to_dense().sum(1)[half_T]).all()


def test_bad_numbers_are_refused():
    with pytest.raises(ValueError, match="positive"):
        Capped(factor=0.0)
    with pytest.raises(ValueError, match="16 experts"):
        Capped(k=17).kinds(SHAPE)
