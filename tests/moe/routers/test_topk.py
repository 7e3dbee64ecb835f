"""Switch's jitter: noise on what the router sees, in training alone."""

import pytest
import torch

from moebench.contracts import Selection, load_attribute
from moebench.moe.layer import LayerWeights
from moebench.moe.plugins import DESCRIPTORS, Switch
from moebench.moe.routing import Context
from moebench.moe.shapes import ModelShape

VARIANTS = [("switch", Switch(jitter=0.01), {})]
HIDDEN, EXPERTS, TOKENS = 32, 16, 48
SHAPE = ModelShape(HIDDEN, 8, EXPERTS, 2, (0, 1), Selection("softmax", 2, True))
FACTORY = next(descriptor.factory for descriptor in DESCRIPTORS if descriptor.name == "switch")


def seeded(*size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def build(jitter):
    weights = LayerWeights(torch.zeros(1), torch.zeros(1))
    return load_attribute(FACTORY)(Switch(jitter=jitter))(weights, SHAPE, 0).router


def training(seed=0):
    return Context(training=True, rng=torch.Generator().manual_seed(seed))


def test_jitter_is_a_factor_of_each_number_and_even_within_its_width():
    """With one-hot inputs a logit is a row's number times its factor."""
    router = build(0.2)
    x_TH = torch.eye(HIDDEN).repeat(400, 1)
    factor = (router(x_TH, training()).logits_TE / router(x_TH, Context()).logits_TE).detach()
    assert 0.8 - 1e-6 <= float(factor.min()) < 0.801
    assert 1.199 < float(factor.max()) <= 1.2 + 1e-6
    assert float(factor.std()) == pytest.approx(0.4 / 12**0.5, rel=0.02)
    torch.testing.assert_close(factor, factor[:, :1].expand_as(factor))  # one factor per number, whatever the expert


def test_jitter_belongs_to_training_and_comes_from_the_generator():
    x_TH, plain, jittered = seeded(TOKENS, HIDDEN), build(0.0), build(0.2)
    still = plain(x_TH, Context())
    assert (plain.needs, jittered.needs) == (frozenset(), {"rng"})
    assert torch.equal(plain(x_TH, training()).logits_TE, still.logits_TE)
    assert torch.equal(jittered(x_TH, Context()).logits_TE, still.logits_TE)
    first, again, other = (jittered(x_TH, training(seed)).logits_TE for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert jittered(x_TH.bfloat16(), training()).logits_TE.dtype == torch.float32
    with pytest.raises(ValueError, match="'rng'"):
        jittered(x_TH, Context(training=True))


@pytest.mark.parametrize("jitter", [-0.1, 1.0])
def test_a_jitter_that_turns_signs_is_refused(jitter):
    with pytest.raises(ValueError, match="jitter"):
        Switch(jitter=jitter)
