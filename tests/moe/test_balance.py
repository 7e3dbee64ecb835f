"""Losses where their value is known: at balance, at collapse, and against each system's own formula."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moebench.contracts import Selection
from moebench.moe.balance.load import cv2_importance, cv2_load, entropy, eta, modality, sequence, switch, z_loss
from moebench.moe.balance.modality import modality_kl, modality_l1
from moebench.moe.balance.registry import LOSSES, Term, total
from moebench.moe.balance.rows import chunks, neighbours
from moebench.moe.balance.sparse import chunk_sparsity, l1, locality
from moebench.moe.router import select
from moebench.moe.routing import Context, Routing

relaxed = settings(deadline=None, max_examples=60)
KINDS = ("ffn",) * 8 + ("constant",) * 2 + ("copy", "zero")
LABELS = Context(modality_T=torch.arange(64) % 2, segment_T=torch.arange(64) // 32)
MEANT = torch.tensor([[True] + [False] * 11, [False] * 6 + [True, True] + [False] * 4])
PARAMETERS = {"cls": {"length": 8}, "l1": {"k": 2}, "modality_l1": {"experts_ME": MEANT}}


def seeded(*size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def of_logits(logits_TE, k=2):
    """The Routing of softmax top-k."""
    indices_TK, weights_TK = select(logits_TE, Selection("softmax", k, renormalize=False))
    return Routing.topk(indices_TK, weights_TK, logits_TE.shape[1], logits_TE, logits_TE.softmax(-1))


def certain(load):
    """Top-1 with probability one, so that f = P = load / T."""
    expert_T = torch.repeat_interleave(torch.arange(len(load)), torch.tensor(load))
    probs_TE = torch.nn.functional.one_hot(expert_T, len(load)).float()
    return Routing.topk(expert_T[:, None], torch.ones(len(expert_T), 1), len(load), None, probs_TE)


def even(tokens, experts, k):
    """Equal loads and equal probabilities."""
    slots_TK = (torch.arange(tokens)[:, None] * k + torch.arange(k)) % experts
    probs_TE = torch.full((tokens, experts), 1 / experts)
    return Routing.topk(slots_TK, torch.full((tokens, k), 1 / k), experts, probs_TE.log(), probs_TE)


def value(name, routing, ctx=LABELS):
    return float(LOSSES[name].function(routing, ctx, **PARAMETERS.get(name, {})))


# --- the registry ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if loss.even is not None])
@pytest.mark.parametrize(("experts", "k"), [(4, 1), (8, 2), (16, 4)])
def test_even_load_has_the_declared_value_for_any_e_and_k(name, experts, k):
    assert value(name, even(64, experts, k)) == pytest.approx(LOSSES[name].even, abs=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_padding_changes_nothing(name):
    logits_TE, valid_T = seeded(64, 12), torch.arange(64) % 4 != 3
    fields = {"modality_T": LABELS.modality_T, "segment_T": LABELS.segment_T}
    padded = of_logits(logits_TE)
    padded = padded.keep(valid_T[padded.token_N])
    with_padding = value(name, padded, Context(valid_T=valid_T, **fields))
    alone = value(
        name, of_logits(logits_TE[valid_T]), Context(**{key: label[valid_T] for key, label in fields.items()})
    )
    assert with_padding == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "cv2_load"])
def test_gradients_are_finite_and_somewhere_not_zero(name):
    logits_TE = seeded(64, 12, seed=1).requires_grad_()
    LOSSES[name].function(of_logits(logits_TE), LABELS, **PARAMETERS.get(name, {})).backward()
    assert torch.isfinite(logits_TE.grad).all()
    assert logits_TE.grad.abs().sum() > 0


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "modality_l1"])
def test_experts_have_no_order(name):
    logits_TE, order_E = seeded(64, 12, seed=2), torch.randperm(12, generator=torch.Generator().manual_seed(3))
    assert value(name, of_logits(logits_TE[:, order_E])) == pytest.approx(value(name, of_logits(logits_TE)), rel=1e-5)


@pytest.mark.parametrize("name", [name for name in LOSSES if not name.startswith("cv2") and name not in ("cls", "l1")])
def test_losses_say_what_they_lack(name):
    bare = Routing.dense(torch.ones(64, 3))
    with pytest.raises(ValueError, match="use a router that scores every expert"):
        value(name, bare)


def test_total_is_the_weighted_sum():
    routing = of_logits(seeded(64, 12, seed=4))
    terms = [Term("switch", 0.01, {"first_only": True}), Term("z", 0.001), Term("cls", 0.05, {"length": 8})]
    expected = 0.01 * switch(routing, first_only=True) + 0.001 * LOSSES["z"].function(routing, None)
    torch.testing.assert_close(
        total(routing, LABELS, terms), expected + 0.05 * chunk_sparsity(routing, LABELS, length=8)
    )
    assert float(total(routing, LABELS, [])) == 0.0


def test_terms_are_checked_when_written():
    with pytest.raises(ValueError, match=r"unknown loss 'swich': did you mean 'switch'\?"):
        Term("swich", 1.0)
    with pytest.raises(ValueError, match=r"unknown parameter of loss 'cls' 'lenght': did you mean 'length'\?"):
        Term("cls", 1.0, {"lenght": 8})


# --- the Switch family -----------------------------------------------------------------------------------------------


@relaxed
@given(st.lists(st.integers(0, 50), min_size=2, max_size=10).filter(any))
def test_switch_is_one_plus_cv2_where_shares_are_probabilities(load):
    routing = certain(load)
    assert float(switch(routing)) == pytest.approx(1 + float(cv2_load(routing)), rel=1e-5)
    assert float(cv2_importance(routing)) == pytest.approx(float(cv2_load(routing)), abs=1e-5)


def test_collapse_is_the_number_of_experts():
    assert float(switch(certain([6, 0, 0, 0]))) == 4.0
    assert float(cv2_load(certain([6, 0, 0, 0]))) == 3.0


@relaxed
@given(st.lists(st.integers(0, 50), min_size=2, max_size=10).filter(any))
def test_balance_is_never_below_one_where_shares_are_probabilities(load):
    assert float(switch(certain(load))) >= 1 - 1e-6


@pytest.mark.parametrize("k", [1, 2])
def test_balance_is_that_of_transformers_over_k(k):
    modeling = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    logits_TE = seeded(64, 8)
    theirs = modeling.load_balancing_loss_func((logits_TE,), 8, k)
    assert float(switch(of_logits(logits_TE, k))) == pytest.approx(float(theirs) / k, rel=1e-6)


def test_balance_normalises_sigmoid_scores():
    scores_TE = seeded(16, 4, seed=1).sigmoid()
    one, doubled = (
        Routing.topk(scores_TE.topk(2).indices, torch.ones(16, 2), 4, None, factor * scores_TE) for factor in (1, 2)
    )
    assert float(switch(one)) == pytest.approx(float(switch(doubled)))


def own_formula(system, routing, k):
    """What a system computes, by its own words, from probabilities and the choices of each token."""
    probs_TE, experts = routing.probs_TE, routing.num_experts
    count_E, mean_E = routing.counts_E.float(), probs_TE.mean(0)
    tokens = len(probs_TE)
    first_E = torch.bincount(probs_TE.argmax(1), minlength=experts) / tokens
    return {
        "gshard": experts * (first_E * mean_E).sum(),
        "transformers": experts * (count_E / tokens * mean_E).sum(),
        "evomoe": experts**2 * (mean_E * count_E / count_E.sum()).mean(),
        "dit": experts * (count_E / (tokens * k) * mean_E).sum(),
        "adamoe_vla": (count_E / count_E.sum() * mean_E).mean(),
    }[system]


@pytest.mark.parametrize(
    ("system", "factor"),
    [
        ("gshard", lambda experts, k: 1),
        ("transformers", lambda experts, k: k),
        ("evomoe", lambda experts, k: 1),
        ("dit", lambda experts, k: 1),
        ("adamoe_vla", lambda experts, k: experts**-2),
    ],
)
@pytest.mark.parametrize("k", [1, 2])
def test_what_systems_add_is_a_factor_times_ours(system, factor, k):
    routing = of_logits(seeded(64, 8, seed=6), k)
    ours = float(switch(routing, first_only=system == "gshard"))
    assert float(own_formula(system, routing, k)) == pytest.approx(factor(8, k) * ours, rel=1e-5)


@pytest.mark.parametrize("tau", [0.25, 0.75, 1.0])
def test_eta_is_the_loss_of_moepp_scaled_to_one_at_its_optimum(tau):
    eta_E = eta(KINDS, tau)
    routing = of_logits(seeded(64, len(KINDS), seed=7))
    theirs = float((eta_E * routing.counts_E / 64 * routing.probs_TE.mean(0)).sum())  # f sums to k = 2
    assert 2 / float((1 / eta_E).sum()) * float(switch(routing, eta_E=eta_E)) == pytest.approx(theirs, rel=1e-5)
    load = [round(tau * 100)] * 8 + [100] * 4
    assert float(switch(certain(load), eta_E=eta_E)) == pytest.approx(1.0, rel=1e-5)
    assert float(switch(certain([100] * 12), eta_E=eta_E)) >= 1.0 - 1e-6


@pytest.mark.parametrize("tau", [0.25, 0.75])
def test_heterogeneous_optimum_is_where_shares_go_with_one_over_eta(tau):
    """R4 (MoEPlusPlus): FFN share tau N_F / (tau N_F + N_Z), and 1, which is k / sum(1 / eta) as the paper counts."""
    load = [round(tau * 100)] * 8 + [100] * 4
    eta_E = eta(KINDS, tau)
    best = float(switch(certain(load), eta_E=eta_E, slots=1))
    assert best == pytest.approx(1.0, rel=1e-6)
    assert sum(load[:8]) / sum(load) == pytest.approx(tau * 8 / (tau * 8 + 4))
    for giver in range(len(load)):
        for taker in {0, len(load) - 1} - {giver}:
            moved = list(load)
            moved[giver] -= 20
            moved[taker] += 20
            assert float(switch(certain(moved), eta_E=eta_E, slots=1)) > best


@pytest.mark.parametrize(("tau", "share"), [(0.25, 1 / 3), (0.75, 0.6)])
def test_training_on_the_heterogeneous_loss_reaches_its_ffn_share(tau, share):
    """R4 (MoEPlusPlus) with real top-2 slots: a router that starts at equal shares moves to the optimum's."""
    x_TH = seeded(2048, 16)
    weight_EH = (seeded(len(KINDS), 16, seed=1) * 0.25).requires_grad_()
    bias_E = torch.zeros(len(KINDS), requires_grad=True)
    optimizer = torch.optim.Adam([weight_EH, bias_E], lr=0.01)
    for _ in range(200):
        optimizer.zero_grad()
        switch(of_logits(x_TH @ weight_EH.T + bias_E), eta_E=eta(KINDS, tau), slots=2).backward()
        optimizer.step()
    load_E = of_logits(x_TH @ weight_EH.T + bias_E).counts_E
    assert float(load_E[:8].sum() / load_E.sum()) == pytest.approx(share, abs=0.05)


def test_z_loss():
    assert float(z_loss(of_logits(torch.zeros(5, 4), 1))) == pytest.approx(math.log(4.0) ** 2)


def test_slots_are_read_from_probabilities_where_entries_are_missing():
    routing = of_logits(seeded(64, len(KINDS), seed=8))
    without_zero = routing.keep(routing.expert_N != len(KINDS) - 1)
    assert len(without_zero.expert_N) < len(routing.expert_N)
    assert float(switch(without_zero, slots=2)) == pytest.approx(float(switch(routing)), rel=1e-6)
    assert float(switch(without_zero)) != pytest.approx(float(switch(routing)), rel=1e-3)


def test_first_choices_count_though_a_capacity_dropped_them():
    routing = of_logits(seeded(64, 8, seed=9))
    cut = routing.keep(torch.arange(len(routing.token_N)) % 3 != 0)
    assert float(switch(cut, first_only=True)) == float(switch(routing, first_only=True))


# --- null experts ----------------------------------------------------------------------------------------------------


def with_nulls(split, true=8, nulls=4, tokens=96):
    """Two true experts per token and one null, whose load and probability are ``split`` over the nulls."""
    true_TK = seeded(tokens, true, seed=10).topk(2).indices
    null_T = torch.tensor([null for null, count in enumerate(split) for _ in range(count)]) + true
    real_TE = seeded(tokens, true, seed=11).softmax(-1) * 0.6
    null_E = torch.tensor(split) / tokens * 0.4
    probs_TE = torch.cat([real_TE, null_E.expand(tokens, nulls)], dim=1)
    indices_TK = torch.cat([true_TK, null_T[:, None]], dim=1)
    return Routing.topk(indices_TK, torch.ones(tokens, 3), true + nulls, None, probs_TE)


def test_bucket_ignores_how_null_mass_is_split_and_plain_switch_does_not():
    """R3 (AdaMoE): 1.0017 both with the bucket; without it the loss falls on identical nulls: 1.0017 and 2.2017."""
    spread, single = with_nulls([24, 24, 24, 24]), with_nulls([96, 0, 0, 0])
    nulls = range(8, 12)
    assert float(switch(spread, bucket=nulls)) == pytest.approx(float(switch(single, bucket=nulls)), abs=1e-6)
    assert float(switch(spread, bucket=nulls)) == pytest.approx(float(switch(spread)), abs=1e-6)
    assert float(switch(single)) > 1.5 * float(switch(spread))


def test_released_bucket_along_the_slots_is_a_no_op():
    """The code for Mixtral slices axis 1 of [T, K, E], where there are K slots and ids of nulls point past them."""
    counts_TKE = torch.nn.functional.one_hot(with_nulls([96, 0, 0, 0]).padded(3)[0], 13)[..., :12].float()
    edited_TKE = counts_TKE.clone()
    edited_TKE[:, 8:] = edited_TKE[:, 8:].mean()
    assert torch.equal(edited_TKE, counts_TKE)


def test_null_mass_at_equilibrium_is_the_share_of_nulls():
    """With f = P the bucketed loss is least where the nulls hold m / (n + m) of all slots."""
    loss_of_mass = {}
    for mass in range(5, 60):
        load = [100 - mass] * 8 + [8 * mass, 0, 0, 0]  # the share of the nulls is mass / 100
        loss_of_mass[mass / 100] = float(switch(certain(load), bucket=range(8, 12)))
    best = min(loss_of_mass, key=loss_of_mass.get)
    assert best == pytest.approx(4 / 12, abs=0.01)
    assert loss_of_mass[best] == pytest.approx(1.0, abs=1e-3)


# --- groups of tokens ------------------------------------------------------------------------------------------------


def test_modality_is_switch_of_each_modality():
    logits_TE = seeded(64, 8, seed=12)
    routing = of_logits(logits_TE)
    parts = [float(switch(of_logits(logits_TE[LABELS.modality_T == label]))) for label in (0, 1)]
    assert float(modality(routing, LABELS)) == pytest.approx(sum(parts) / 2, rel=1e-5)


def test_modality_counts_only_the_experts_that_are_seen():
    """Even load over the visible experts is 1, whatever their number (MoIIE: 3 of 4 each)."""
    visible_ME = torch.tensor([[True, True, True, False], [False, True, True, True]])
    label_T = torch.arange(48) % 2
    logits_TE = torch.zeros(48, 4).masked_fill(~visible_ME[label_T], -math.inf)
    expert_T = torch.where(label_T == 0, torch.arange(48) // 2 % 3, torch.arange(48) // 2 % 3 + 1)
    routing = Routing.topk(expert_T[:, None], torch.ones(48, 1), 4, logits_TE, logits_TE.softmax(-1))
    ctx = Context(modality_T=label_T)
    assert float(modality(routing, ctx, visible_ME=visible_ME)) == pytest.approx(1.0, rel=1e-6)
    assert float(modality(routing, ctx)) == pytest.approx(4 / 3, rel=1e-6)


def test_a_modality_without_tokens_is_left_out():
    routing = of_logits(seeded(64, 8, seed=13))
    ctx = Context(modality_T=torch.full((64,), 2))
    assert float(modality(routing, ctx, visible_ME=torch.ones(4, 8, dtype=torch.bool))) == pytest.approx(
        float(switch(routing)), rel=1e-6
    )
    with pytest.raises(ValueError, match="needs modality_T"):
        modality(routing, Context())


def of_probabilities(probs_TE):
    return Routing.dense(probs_TE, probs_TE.log(), probs_TE)


def test_distinct_experts_cost_nothing_once_modalities_have_them():
    """0 where each token is certain of its modality's expert, 2 / E where it is certain of another one."""
    label_T, meant_ME = torch.arange(10) % 2, torch.eye(5, dtype=torch.bool)[[1, 4]]
    ctx = Context(modality_T=label_T)
    for shift, wanted in ((0, 0.0), (1, 2 / 5)):
        routing = of_probabilities(meant_ME[label_T].roll(shift, 1).float())
        assert float(modality_l1(routing, ctx, experts_ME=meant_ME)) == pytest.approx(wanted, abs=1e-7)


@pytest.mark.parametrize("meant", [1, 2, 4])
def test_several_experts_leave_a_rest_of_what_they_are_too_many(meant):
    """The least is (n - 1) / E: p over the marked ones, whatever its parts."""
    probs_TE = torch.zeros(6, 8)
    probs_TE[:, :meant] = seeded(6, meant, seed=21).softmax(-1)
    meant_ME = (torch.arange(8) < meant)[None]
    ctx = Context(modality_T=torch.zeros(6, dtype=torch.int64))
    assert float(modality_l1(of_probabilities(probs_TE), ctx, experts_ME=meant_ME)) == pytest.approx((meant - 1) / 8)


def test_distinct_loss_is_the_sum_of_modalities_by_their_tokens():
    """Uni-MoE's formula: (tokens of a modality / all tokens) * mean over them; a modality without experts adds none."""
    routing, label_T = of_logits(seeded(60, 8, seed=22)), torch.tensor([0] * 10 + [1] * 30 + [2] * 20)
    meant_ME = torch.zeros(3, 8, dtype=torch.bool)
    meant_ME[0, 2], meant_ME[1, 5:7] = True, True
    parts = [(routing.probs_TE[label_T == m] - meant_ME[m].float()).abs().mean() * (label_T == m).sum() for m in (0, 1)]
    found = modality_l1(routing, Context(modality_T=label_T), experts_ME=meant_ME)
    torch.testing.assert_close(found, sum(parts) / 60)


def test_a_step_down_the_distinct_loss_moves_tokens_to_their_experts():
    logits_TE, label_T = seeded(40, 6, seed=23).requires_grad_(), torch.arange(40) % 2
    meant_ME = torch.eye(6, dtype=torch.bool)[[0, 3]]
    routing = of_logits(logits_TE)
    modality_l1(routing, Context(modality_T=label_T), experts_ME=meant_ME).backward()
    assert bool((logits_TE.grad[meant_ME[label_T]] < 0).all())
    torch.testing.assert_close(logits_TE.grad.sum(1), torch.zeros(40), atol=1e-7, rtol=0)


def test_divergence_is_none_where_modalities_choose_alike():
    """1 exactly, with no slope: KL is at its least there."""
    logits_TE = seeded(20, 6, seed=24).repeat(3, 1).requires_grad_()
    label_T = torch.arange(3).repeat_interleave(20)
    for released in (False, True):
        (gradient_TE,) = torch.autograd.grad(
            loss := modality_kl(of_logits(logits_TE), Context(modality_T=label_T), released=released), logits_TE
        )
        assert float(loss.detach()) == pytest.approx(1.0, abs=1e-6)
        assert float(gradient_TE.abs().max()) < 1e-7


def test_divergence_by_hand_and_its_order():
    """KL(P_b || P_a) of the later modality from the earlier one, the mean over three pairs."""
    mean_ME = seeded(3, 5, seed=25).softmax(-1)
    routing = of_probabilities(mean_ME.repeat_interleave(4, 0))
    ctx = Context(modality_T=torch.tensor([7, 2, 4]).repeat_interleave(4))
    kl = {(a, b): (mean_ME[b] * (mean_ME[b] / mean_ME[a]).log()).sum() for a in range(3) for b in range(3)}
    wanted = 1 - (kl[1, 2] + kl[1, 0] + kl[2, 0]) / 3  # modalities 2 < 4 < 7 are rows 1, 2 and 0
    torch.testing.assert_close(modality_kl(routing, ctx), wanted)
    assert float(wanted) < 1


def test_a_step_down_the_divergence_loss_tells_modalities_apart():
    start_TE, label_T = seeded(40, 6, seed=26), torch.arange(40) % 2
    ctx, values = Context(modality_T=label_T), []
    logits_TE = start_TE.clone().requires_grad_()
    for _ in range(3):
        loss = modality_kl(of_logits(logits_TE), ctx)
        (gradient_TE,) = torch.autograd.grad(loss, logits_TE)
        logits_TE = (logits_TE - 50 * gradient_TE).detach().requires_grad_()
        values.append(float(loss.detach()))
    assert values[0] > values[1] > values[2]


def test_the_released_divergence_can_hardly_grow():
    """Softmax of probabilities lies within a factor of e, and the divergence is over E: modalities as far apart as
    can be have 0.963, where without it they have -86."""
    routing = of_probabilities(torch.eye(6)[[0, 0, 3, 3]])
    ctx = Context(modality_T=torch.tensor([0, 0, 1, 1]))
    twice_ME = torch.eye(6)[[0, 3]].softmax(-1)
    wanted = 1 - (twice_ME[1] * (twice_ME[1] / twice_ME[0]).log()).sum() / 6
    torch.testing.assert_close(modality_kl(routing, ctx, released=True), wanted)
    assert float(wanted) == pytest.approx(0.963, abs=1e-3)
    assert float(modality_kl(routing, ctx)) < -80


def test_one_modality_alone_has_no_divergence_and_none_at_all_is_told():
    routing = of_logits(seeded(8, 6, seed=27))
    assert float(modality_kl(routing, Context(modality_T=torch.full((8,), 3)))) == 0.0
    for call in (lambda: modality_kl(routing), lambda: modality_l1(routing, Context(), experts_ME=MEANT)):
        with pytest.raises(ValueError, match="needs modality_T"):
            call()


def test_sequence_balance_is_stricter_than_that_of_the_batch():
    """Each sequence has its own half of the experts: the batch is balanced and no sequence is."""
    first = torch.arange(32) % 4
    probs_TE = torch.nn.functional.one_hot(torch.cat([first, first + 4]), 8).float()
    routing = Routing.topk(probs_TE.argmax(1)[:, None], torch.ones(64, 1), 8, None, probs_TE)
    assert float(switch(routing)) == pytest.approx(1.0)
    assert float(sequence(routing, LABELS)) == pytest.approx(2.0)
    assert float(sequence(routing)) == pytest.approx(1.0)


def test_a_batch_of_padding_has_no_loss():
    routing = of_logits(seeded(8, 4)).keep(torch.zeros(16, dtype=torch.bool))
    ctx = Context(valid_T=torch.zeros(8, dtype=torch.bool), segment_T=torch.zeros(8).long())
    assert [float(loss(routing, ctx)) for loss in (switch, sequence, entropy, cv2_importance)] == [0.0] * 4


# --- variations and entropy ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 3])
def test_smooth_load_becomes_the_counts_without_noise_and_has_a_gradient_with_it(k):
    logits_TE = seeded(64, 8, seed=14).requires_grad_()
    routing = of_logits(logits_TE, k)
    assert float(cv2_load(routing, k=k, noise=1e-6).detach()) == pytest.approx(float(cv2_load(routing)), rel=1e-5)
    cv2_load(routing, k=k, noise=0.5).backward()
    assert logits_TE.grad.abs().sum() > 0


def test_smooth_load_is_the_chance_to_stay_among_the_best():
    """One token: the chance of an expert is that its noisy logit passes the others' best, by simulation."""
    logits_E = torch.tensor([1.0, 0.6, 0.0, -0.5])
    routing = of_logits(logits_E.expand(1, 4), 1)
    noise_NE = seeded(200_000, 4, seed=15) * 0.7
    others_E = torch.tensor([0.6, 1.0, 1.0, 1.0])
    chance_E = (logits_E + noise_NE > others_E).float().mean(0)
    expected = float(chance_E.var(correction=0) / chance_E.mean() ** 2)
    assert float(cv2_load(routing, k=1, noise=0.7)) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("k", [None, 0, 8])
def test_smooth_load_needs_a_possible_k(k):
    with pytest.raises(ValueError, match=f"k between 1 and 7, not {k}"):
        cv2_load(of_logits(seeded(4, 8)), k=k, noise=1.0)


def test_importance_of_released_code_is_larger_by_e_over_e_minus_one():
    routing = of_logits(seeded(64, 8, seed=16))
    importance_E = routing.to_dense().sum(0)
    released = importance_E.var() / (importance_E.mean() ** 2 + 1e-10)
    assert float(released) == pytest.approx(8 / 7 * float(cv2_importance(routing)), rel=1e-5)


def test_entropy_of_certainty_is_zero_with_a_finite_gradient():
    logits_TE = torch.tensor([[0.0, -math.inf, -math.inf]]).requires_grad_()
    loss = entropy(of_logits(logits_TE, 1))
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert torch.isfinite(logits_TE.grad[0, 0])


def test_entropy_of_half_the_experts():
    probs_TE = torch.tensor([[0.5, 0.5, 0.0, 0.0]])
    assert float(entropy(Routing.topk(probs_TE.topk(1).indices, torch.ones(1, 1), 4, None, probs_TE))) == 0.5


# --- chunks, neighbours and k ----------------------------------------------------------------------------------------


@relaxed
@given(st.lists(st.integers(0, 2), max_size=40), st.integers(1, 5), st.data())
def test_chunks_and_neighbours_stay_within_a_segment_and_in_order(segments, length, data):
    tokens = len(segments)
    valid = data.draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens))
    routing = Routing.dense(torch.ones(tokens, 2))
    ctx = Context(segment_T=torch.tensor(segments, dtype=torch.int64), valid_T=torch.tensor(valid, dtype=torch.bool))
    by_segment = {s: [t for t in range(tokens) if segments[t] == s and valid[t]] for s in sorted(set(segments))}
    expected = [own[i : i + length] for own in by_segment.values() for i in range(0, len(own) - length + 1, length)]
    assert chunks(routing, ctx, length).tolist() == expected
    pairs = [pair for own in by_segment.values() for pair in itertools.pairwise(own)]
    assert list(zip(*(side.tolist() for side in neighbours(routing, ctx)), strict=True)) == pairs


def test_cls_is_the_expected_union_of_a_chunk():
    """R9 (BlockFFN): 0.80 of 40 experts for chunks of 64 tokens, as (1 - 1/40) ** 64 and the simulated union say."""
    generator = torch.Generator().manual_seed(17)
    q_TE = torch.randn(1024, 40, generator=generator).relu()
    q_TE = q_TE / q_TE.sum(1, keepdim=True)
    loss = float(chunk_sparsity(Routing.dense(q_TE)))
    runs = [torch.rand(1024, 40, generator=generator) < q_TE for _ in range(100)]
    union_R = torch.stack([run.reshape(16, 64, 40).any(1).float().mean() for run in runs])
    assert loss == pytest.approx(1 - (1 - 1 / 40) ** 64, abs=0.01)
    assert loss == pytest.approx(float(union_R.mean()), abs=5 * float(union_R.std()) / 10)


def test_cls_of_one_expert_for_all_and_of_none_in_common():
    assert float(chunk_sparsity(certain([64, 0, 0, 0]))) == 0.25
    assert float(chunk_sparsity(certain([1] * 64))) == 1.0
    assert float(chunk_sparsity(certain([8, 8]), length=8)) == 0.5


def test_cls_has_a_gradient_where_an_expert_is_certain():
    gate_TE = torch.tensor([[1.0, 0.0], [0.5, 0.5]]).requires_grad_()
    chunk_sparsity(Routing.dense(gate_TE), length=2).backward()
    assert torch.isfinite(gate_TE.grad).all()


def test_cls_ignores_the_scale_of_weights():
    gate_TE = seeded(64, 8, seed=18).relu()
    assert float(chunk_sparsity(Routing.dense(3 * gate_TE))) == pytest.approx(
        float(chunk_sparsity(Routing.dense(gate_TE))), rel=1e-5
    )


def test_released_epsilon_counts_what_nobody_chose_as_less_than_nothing():
    routing = certain([64, 0, 0, 0])
    expected = 1 - (1e-5**64 + 3 * (1 + 1e-5) ** 64) / 4
    assert float(chunk_sparsity(routing, epsilon=1e-5)) == pytest.approx(expected, abs=1e-6)
    assert float(chunk_sparsity(routing, epsilon=1e-5)) < float(chunk_sparsity(routing))


def test_cls_without_a_whole_chunk_is_refused():
    with pytest.raises(ValueError, match="no segment holds a chunk of 64 tokens"):
        chunk_sparsity(certain([32, 31]))


def test_locality_is_the_steepness_times_the_share_that_changes_sides():
    side_TE = torch.where(seeded(64, 8, seed=19) > 0, 1.0, -1.0)
    routing = Routing.topk(side_TE.topk(1).indices, torch.ones(64, 1), 8, side_TE, side_TE.relu())
    changed = (side_TE[1:] != side_TE[:-1]).float().mean()
    assert float(locality(routing)) == pytest.approx(100 * float(changed), rel=1e-5)
    assert float(locality(routing, steepness=50.0)) == pytest.approx(50 * float(changed), rel=1e-5)
    still = Routing.topk(side_TE.topk(1).indices, torch.ones(64, 1), 8, side_TE[:1].expand(64, 8), None)
    assert float(locality(still)) == pytest.approx(0.0, abs=1e-6)


def test_locality_does_not_cross_a_segment():
    side_TE = torch.ones(64, 4)
    side_TE[32:] = -1
    routing = Routing.topk(side_TE.topk(1).indices, torch.ones(64, 1), 4, side_TE, side_TE.relu())
    assert float(locality(routing, LABELS)) == pytest.approx(0.0, abs=1e-6)
    assert float(locality(routing)) == pytest.approx(100 / 63, rel=1e-5)
    with pytest.raises(ValueError, match="no segment has two tokens"):
        locality(routing, Context(segment_T=torch.arange(64)))


def test_l1_is_the_mean_sum_of_weights_at_even_load_and_k():
    assert float(l1(even(64, 8, 2).scaled(3.0), k=2)) == pytest.approx(3.0)
    assert float(l1(even(64, 8, 4), k=2)) == pytest.approx(2.0)


def test_l1_presses_the_busy_expert_most():
    weight_TE = torch.ones(16, 4)
    weight_TE[:, 1:] = 0
    weight_TE[::4, 1:] = 1
    weight_TE.requires_grad_()
    l1(Routing.dense(weight_TE), k=1).backward()
    grad_E = weight_TE.grad[0]
    assert float(grad_E[0]) == pytest.approx(4 * float(grad_E[1]))
    assert not weight_TE.grad[1, 1:].any()
    with pytest.raises(ValueError, match="give a positive number"):
        l1(Routing.dense(weight_TE), k=0)
