"""Masks, noise and learned permutations, against scipy and against their own promises."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moebench.moe.router import Linear, Pipeline, Softmax, TopK
from moebench.moe.router_parts import (
    Permutation,
    Permuted,
    best_assignment,
    gumbel_noise,
    masked_routing,
    permutation_entropy,
    seeded_uniform,
    sinkhorn,
)
from moebench.moe.routing import Context

HIDDEN, EXPERTS, TOKENS = 16, 8, 40
SEARCHING = Context(training=True, progress=0.0)


def seeded(*size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def pipeline():
    return Pipeline(Linear(seeded(EXPERTS, HIDDEN, seed=4) / 4), TopK(2), Softmax(renormalize=True))


def permuted(seed=1):
    return Permuted(pipeline(), Permutation(seeded(1, EXPERTS, EXPERTS, seed=seed) * 0.05, until=0.5))


def test_a_mask_keeps_entries_whatever_their_weight():
    gate_TE, keep_TE = torch.tensor([[0.0, -1.0], [2.0, 0.0]]), torch.tensor([[True, True], [False, False]])
    routing = masked_routing(gate_TE, keep_TE, Context())
    assert (routing.token_N.tolist(), routing.expert_N.tolist()) == ([0, 0], [0, 1])
    assert routing.weight_N.tolist() == [0.0, -1.0]
    assert len(masked_routing(gate_TE, keep_TE, Context(valid_T=torch.tensor([False, True]))).token_N) == 0


def test_uniform_numbers_are_uniform_and_seeded():
    numbers = seeded_uniform((50_000,), 0.5, 0, "a")
    shares = torch.histc(numbers, bins=10, min=-0.5, max=0.5) / 50_000
    torch.testing.assert_close(shares, torch.full((10,), 0.1), atol=0.006, rtol=0)
    assert torch.equal(numbers, seeded_uniform((50_000,), 0.5, 0, "a"))
    assert not torch.equal(numbers, seeded_uniform((50_000,), 0.5, 0, "b"))


def test_gumbel_noise_has_its_mean_and_variance():
    noise = gumbel_noise(torch.zeros(400, 500), torch.Generator().manual_seed(0))
    assert float(noise.mean()) == pytest.approx(0.5772, abs=0.01)
    assert float(noise.var()) == pytest.approx(1.6449, abs=0.03)
    assert noise.isfinite().all()


@settings(deadline=None, max_examples=80)
@given(size=st.integers(1, 12), seed=st.integers(0, 10_000), whole=st.booleans())
def test_the_assignment_is_scipys(size, seed, whole):
    optimize = pytest.importorskip("scipy.optimize")
    value_EE = seeded(size, size, seed=seed)
    value_EE = value_EE.mul(2).round() if whole else value_EE
    rows, columns = optimize.linear_sum_assignment(value_EE.numpy(), maximize=True)
    column_E = best_assignment(value_EE)
    assert sorted(column_E.tolist()) == list(range(size))
    own = float(value_EE[torch.arange(size), column_E].double().sum())
    assert own == pytest.approx(float(value_EE[rows, columns].double().sum()), abs=1e-5)


def test_an_assignment_of_what_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="smaller learning rate"):
        best_assignment(torch.tensor([[float("nan")]]))


@settings(deadline=None, max_examples=40)
@given(size=st.integers(1, 8), seed=st.integers(0, 1000))
def test_sinkhorn_is_doubly_stochastic(size, seed):
    soft_EE = sinkhorn(seeded(1, size, size, seed=seed), 60)[0]
    torch.testing.assert_close(soft_EE.sum(1), torch.ones(size))
    torch.testing.assert_close(soft_EE.sum(0), torch.ones(size), atol=1e-3, rtol=0)


def test_sinkhorn_tends_to_the_best_assignment():
    logits_EE = seeded(EXPERTS, EXPERTS, seed=2)
    soft_EE = sinkhorn(logits_EE[None] / 0.01, 2000)[0]
    assert torch.equal(soft_EE.argmax(1), best_assignment(logits_EE))
    assert soft_EE.amax(1).min() > 0.9


def test_entropy_of_a_permutation():
    hard = torch.eye(EXPERTS).flip(0)[None]
    assert float(permutation_entropy(hard)) == pytest.approx(0, abs=1e-4)
    even = torch.full((1, EXPERTS, EXPERTS), 1 / EXPERTS)
    assert float(permutation_entropy(even)) == pytest.approx(2 * EXPERTS * float(torch.tensor(EXPERTS).log()), rel=1e-3)


def test_a_permuted_router_renames_experts():
    """G' = G Pi, with logits and probabilities in the new order as well."""
    router, x_TH = permuted(), seeded(TOKENS, HIDDEN)
    plain, renamed = router.router(x_TH, Context()), router(x_TH, Context())
    order_E = router.permutation.order_JE[0]
    assert not torch.equal(order_E, torch.arange(EXPERTS))
    for field in ("logits_TE", "probs_TE"):
        assert torch.equal(getattr(renamed, field)[:, order_E], getattr(plain, field))
    assert torch.equal(renamed.to_dense()[:, order_E], plain.to_dense())
    assert torch.equal(renamed.padded()[0], renamed.logits_TE.topk(2).indices)


def test_a_search_spreads_the_gate_and_keeps_its_sums():
    router, x_TH = permuted(), seeded(TOKENS, HIDDEN)
    routing = router(x_TH, SEARCHING)
    torch.testing.assert_close(routing.to_dense().sum(1), torch.ones(TOKENS))
    torch.testing.assert_close(routing.probs_TE.sum(1), torch.ones(TOKENS))
    assert routing.logits_TE is None
    (routing.to_dense() * seeded(TOKENS, EXPERTS, seed=3)).sum().backward()
    assert router.permutation.logits_JEE.grad.abs().max() > 1e-5
    assert router.router.scorer.weight_EH.grad.abs().max() > 1e-5


def test_the_published_search_ends_before_it_has_converged():
    """At tau = 1e-7 150 iterations leave experts with two names, so what follows must be rounded as a whole."""
    router = permuted()
    soft_EE = router.permutation.soft(0.499)[0]
    order_E = router.permutation.order_JE[0]
    assert len(soft_EE.argmax(1).unique()) < EXPERTS
    assert len(order_E.unique()) == EXPERTS
    assert float(soft_EE[torch.arange(EXPERTS), order_E].detach().sum()) > EXPERTS / 2


def test_an_update_rounds_anew():
    router = permuted()
    before_E = router.permutation.order_JE[0].clone()
    with torch.no_grad():
        router.permutation.logits_JEE.neg_()
    assert torch.equal(router.permutation.order_JE[0], before_E)
    router.update(router(seeded(TOKENS, HIDDEN), Context()))
    assert not torch.equal(router.permutation.order_JE[0], before_E)


def test_a_permuted_router_is_what_its_router_is():
    router = permuted()
    assert router.needs == {"progress"}
    assert (router.causal, router.scope) == (True, "layer")
