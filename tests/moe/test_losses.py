"""Losses at the points where their value is known, and the optimum of the heterogeneous loss (MoE++)."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moebench.contracts import Selection
from moebench.moe.losses import balance_loss, capacities, eta, heterogeneous_loss, mean_probability, z_loss
from moebench.moe.router import select
from moebench.moe.routing import Context, Routing

FFN, OTHERS = 8, 4
KINDS = ("ffn",) * FFN + ("constant",) * 2 + ("copy", "zero")


def of_logits(logits_TE, k):
    """The Routing of softmax top-k."""
    indices_TK, weights_TK = select(logits_TE, Selection("softmax", k, renormalize=False))
    return Routing.topk(indices_TK, weights_TK, logits_TE.shape[1], logits_TE, logits_TE.softmax(-1))


def certain(load):
    """Top-1 with probability one, so that f = P = load / T."""
    expert_T = torch.repeat_interleave(torch.arange(len(load)), torch.tensor(load))
    probs_TE = torch.nn.functional.one_hot(expert_T, len(load)).float()
    return Routing.topk(expert_T[:, None], torch.ones(len(expert_T), 1), len(load), None, probs_TE)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_balance_is_one_at_uniform_for_any_k(k):
    slots_TK = (torch.arange(8)[:, None] + torch.arange(k)) % 8
    routing = Routing.topk(slots_TK, torch.ones(8, k), 8, None, torch.full((8, 8), 0.125))
    assert float(balance_loss(routing)) == 1.0


def test_balance_is_the_number_of_experts_at_collapse():
    assert float(balance_loss(certain([6, 0, 0, 0]))) == 4.0


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 50), min_size=2, max_size=10).filter(any))
def test_balance_is_never_below_one_where_shares_are_probabilities(load):
    assert float(balance_loss(certain(load))) >= 1 - 1e-6


@pytest.mark.parametrize("k", [1, 2])
def test_balance_is_that_of_transformers_over_k(k):
    modeling = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    logits_TE = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    theirs = modeling.load_balancing_loss_func((logits_TE,), 8, k)
    assert float(balance_loss(of_logits(logits_TE, k))) == pytest.approx(float(theirs) / k, rel=1e-6)


def test_balance_normalises_sigmoid_scores():
    scores_TE = torch.rand(16, 4, generator=torch.Generator().manual_seed(1))
    routing = Routing.topk(scores_TE.topk(2).indices, torch.ones(16, 2), 4, None, scores_TE)
    doubled = Routing.topk(scores_TE.topk(2).indices, torch.ones(16, 2), 4, None, scores_TE * 2)
    assert float(mean_probability(routing).sum()) == pytest.approx(1.0)
    assert float(balance_loss(routing)) == pytest.approx(float(balance_loss(doubled)))


@pytest.mark.parametrize("tau", [0.25, 0.75])
def test_heterogeneous_optimum_is_where_shares_go_with_one_over_eta(tau):
    """R4 (MoEPlusPlus): FFN share tau N_F / (tau N_F + N_Z), and a loss of k / sum(1 / eta)."""
    load = [round(tau * 100)] * FFN + [100] * OTHERS
    eta_E = eta(KINDS, tau)
    best = float(heterogeneous_loss(certain(load), eta_E, k=1))
    assert best == pytest.approx(1 / float((1 / eta_E).sum()), rel=1e-6)
    assert sum(load[:FFN]) / sum(load) == pytest.approx(tau * FFN / (tau * FFN + OTHERS))
    for giver in range(len(load)):
        for taker in {0, len(load) - 1} - {giver}:
            moved = list(load)
            moved[giver] -= 20
            moved[taker] += 20
            assert float(heterogeneous_loss(certain(moved), eta_E, k=1)) > best


@pytest.mark.parametrize(("tau", "share"), [(0.25, 1 / 3), (0.75, 0.6)])
def test_training_on_the_heterogeneous_loss_reaches_its_ffn_share(tau, share):
    """R4 (MoEPlusPlus) with real top-2 slots: a router that starts at equal shares moves to the optimum's."""
    generator = torch.Generator().manual_seed(0)
    x_TH = torch.randn(2048, 16, generator=generator)
    weight_EH = (torch.randn(len(KINDS), 16, generator=generator) * 0.25).requires_grad_()
    bias_E = torch.zeros(len(KINDS), requires_grad=True)
    optimizer = torch.optim.Adam([weight_EH, bias_E], lr=0.01)
    for _ in range(200):
        optimizer.zero_grad()
        heterogeneous_loss(of_logits(x_TH @ weight_EH.T + bias_E, 2), eta(KINDS, tau), 2).backward()
        optimizer.step()
    load_E = of_logits(x_TH @ weight_EH.T + bias_E, 2).counts_E
    assert float(load_E[:FFN].sum() / load_E.sum()) == pytest.approx(share, abs=0.05)


def test_heterogeneous_loss_counts_slots_that_left_the_routing():
    logits_TE = torch.randn(64, len(KINDS), generator=torch.Generator().manual_seed(2))
    routing, eta_E = of_logits(logits_TE, 2), eta(KINDS, 0.5)
    without_zero = routing.keep(routing.expert_N != len(KINDS) - 1)
    assert len(without_zero.expert_N) < len(routing.expert_N)
    assert float(heterogeneous_loss(without_zero, eta_E, 2)) == float(heterogeneous_loss(routing, eta_E, 2))


@pytest.mark.parametrize("tau", [Fraction(1, 4), Fraction(3, 4), Fraction(1)])
@pytest.mark.parametrize("others", [4, 8])
def test_capacities_add_up_to_gamma_times_the_assignments(tau, others):
    """R5 (MoEPlusPlus), exactly, in rational numbers."""
    gamma = Fraction(11, 10)
    of_ffn, of_other = capacities(1000, 2, tau, 16, others, gamma)
    assert 16 * of_ffn + others * of_other == gamma * 2 * 1000
    assert of_ffn == tau * of_other


def test_z_loss():
    assert float(z_loss(of_logits(torch.zeros(5, 4), 1))) == pytest.approx(float(torch.tensor(4.0).log()) ** 2)


@pytest.mark.parametrize("loss", [balance_loss, z_loss, lambda r, c: heterogeneous_loss(r, eta(KINDS, 0.5), 2, c)])
def test_losses_leave_out_padding(loss):
    logits_TE = torch.randn(12, len(KINDS), generator=torch.Generator().manual_seed(3))
    valid_T = torch.arange(12) < 9
    padded = of_logits(logits_TE, 2)
    padded = padded.keep(valid_T[padded.token_N])
    assert float(loss(padded, Context(valid_T=valid_T))) == pytest.approx(
        float(loss(of_logits(logits_TE[:9], 2), None))
    )


@pytest.mark.parametrize("loss", [balance_loss, z_loss])
def test_losses_say_what_they_lack(loss):
    with pytest.raises(ValueError, match="use a router that scores"):
        loss(Routing.dense(torch.eye(3)))


@pytest.mark.parametrize("loss", [balance_loss, z_loss, lambda r: heterogeneous_loss(r, eta(KINDS, 0.5), 2)])
def test_losses_have_gradients(loss):
    logits_TE = torch.randn(16, len(KINDS), generator=torch.Generator().manual_seed(4)).requires_grad_()
    loss(of_logits(logits_TE, 2)).backward()
    assert torch.isfinite(logits_TE.grad).all()
    assert logits_TE.grad.abs().sum() > 0
