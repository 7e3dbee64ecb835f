"""Capacity: what every policy promises, and what each one claims, alone."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moebench.contracts import Selection
from moebench.moe.capacity import Capacity, CapacityRule, capacities, choices, limit, with_capacity
from moebench.moe.router import Linear, Pipeline, Router, RouterBundle, Softmax, TopK, select
from moebench.moe.routing import Context, Routing
from moebench.moe.schedules import Schedule

relaxed = settings(deadline=None, max_examples=60)
POLICIES = ("position", "probs", "random")


def seeded(*size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def context(seed=0, **changes):
    return Context(rng=torch.Generator().manual_seed(seed), **changes)


def of_logits(logits_TE, k=1, renormalize=False):
    indices_TK, weights_TK = select(logits_TE, Selection("softmax", k, renormalize))
    return Routing.topk(indices_TK, weights_TK, logits_TE.shape[1], logits_TE, logits_TE.softmax(-1))


def linear_router(tokens=4096, experts=16, hidden=48, seed=0):
    """Top-1 of a random linear router: the setting of R10.

    The fewer hidden sizes, the more the norms of its rows differ, and with them the load: 10.8 % of all tokens are
    dropped at about 50, 9.5 % at 64 and 13.1 % at 32.
    """
    return of_logits(seeded(tokens, hidden, seed=seed) @ seeded(experts, hidden, seed=seed + 1).T / hidden**0.5)


def pairs_of(routing):
    return set(zip(routing.token_N.tolist(), routing.expert_N.tolist(), strict=True))


@st.composite
def cases(draw):
    """A Routing of any load, and a rule."""
    tokens, experts = draw(st.integers(0, 30)), draw(st.integers(1, 6))
    k = draw(st.integers(1, experts))
    rule = CapacityRule(
        factor=draw(st.sampled_from([0.25, 0.5, 1.0, 1.25, 2.0])),
        k=k,
        policy=draw(st.sampled_from(POLICIES)),
        first_choices=draw(st.booleans()),
        renormalize=draw(st.booleans()),
        least=draw(st.integers(0, 3)),
    )
    return of_logits(seeded(tokens, experts, seed=draw(st.integers(0, 99))) * 2, k), rule


# --- every policy ----------------------------------------------------------------------------------------------------


@relaxed
@given(cases())
def test_every_expert_keeps_as_much_as_it_can_and_no_more(case):
    routing, rule = case
    kept = limit(routing, ("ffn",) * routing.num_experts, rule, context())
    slots = max(math.ceil(Fraction(rule.factor) * rule.k * routing.num_tokens / routing.num_experts), rule.least)
    assert torch.equal(kept.counts_E, routing.counts_E.clamp(max=slots))
    assert pairs_of(kept) <= pairs_of(routing)
    assert kept.logits_TE is routing.logits_TE


@relaxed
@given(cases())
def test_renormalised_weights_keep_the_sum_of_each_token(case):
    routing, rule = case
    kept = limit(routing, ("ffn",) * routing.num_experts, rule, context())
    before_T, after_T = routing.to_dense().sum(1), kept.to_dense().sum(1)
    if rule.renormalize:
        torch.testing.assert_close(after_T, torch.where(kept.k_T > 0, before_T, 0.0))
    else:
        before = dict(
            zip(zip(routing.token_N.tolist(), routing.expert_N.tolist(), strict=True), routing.weight_N, strict=True)
        )
        assert all(
            before[pair] == weight
            for pair, weight in zip(
                zip(kept.token_N.tolist(), kept.expert_N.tolist(), strict=True), kept.weight_N, strict=True
            )
        )


@relaxed
@given(cases())
def test_no_second_choice_is_kept_where_a_first_choice_is_dropped(case):
    """GShard's priority, exactly: within an expert whatever was dropped ranked no better than what was kept."""
    routing, rule = case
    rule = CapacityRule(rule.factor, rule.k, rule.policy, first_choices=True)
    kept = pairs_of(limit(routing, ("ffn",) * routing.num_experts, rule, context()))
    worst_kept, best_dropped = {}, {}
    for token, expert, choice in zip(
        routing.token_N.tolist(), routing.expert_N.tolist(), choices(routing).tolist(), strict=True
    ):
        if (token, expert) in kept:
            worst_kept[expert] = max(worst_kept.get(expert, 0), choice)
        else:
            best_dropped[expert] = min(best_dropped.get(expert, math.inf), choice)
    assert all(worst_kept.get(expert, 0) <= choice for expert, choice in best_dropped.items())


def test_without_that_rule_a_second_choice_may_win():
    """Token 0 takes the one slot of expert 1 with its second choice, before token 1 comes with its first."""
    routing = Routing.topk(torch.tensor([[0, 1], [1, 0]]), torch.tensor([[0.6, 0.4], [0.9, 0.1]]), 2)
    kinds, half = ("ffn", "ffn"), 0.5
    assert pairs_of(limit(routing, kinds, CapacityRule(half, 2))) == {(0, 0), (0, 1)}
    assert pairs_of(limit(routing, kinds, CapacityRule(half, 2, first_choices=True))) == {(0, 0), (1, 1)}


def test_gshard_gives_the_other_expert_the_whole_weight():
    """Weights p / (sum of the kept p): 1 for a token that lost one of its two experts."""
    routing = Routing.topk(torch.tensor([[0, 1], [0, 1]]), torch.tensor([[0.6, 0.3], [0.5, 0.2]]) / 0.9, 2)
    rule = CapacityRule(0.5, 2, first_choices=True, renormalize=True)
    kept = limit(routing, ("ffn", "ffn"), rule)
    assert pairs_of(kept) == {(0, 0), (0, 1)}
    one_lost = limit(
        Routing.topk(torch.tensor([[0, 1], [0, 2]]), torch.tensor([[0.6, 0.4], [0.7, 0.3]]), 3),
        ("ffn",) * 3,
        CapacityRule(0.5, 2, renormalize=True),
    )
    torch.testing.assert_close(one_lost.to_dense(), torch.tensor([[0.6, 0.4, 0.0], [0.0, 0.0, 1.0]]))


def test_weights_of_both_signs_are_not_renormalised():
    routing = Routing.dense(torch.tensor([[1.0, -1.0]]))
    with pytest.raises(ValueError, match="use renormalize=False"):
        limit(routing, ("ffn", "ffn"), CapacityRule(k=2, renormalize=True))


def test_gradients_pass_through_what_is_kept():
    logits_TE = seeded(32, 4, seed=3).requires_grad_()
    routing = of_logits(logits_TE, 2, renormalize=True)
    kept = limit(routing, ("ffn",) * 4, CapacityRule(0.5, 2, renormalize=True))
    (kept.to_dense() * seeded(32, 4, seed=4)).sum().backward()
    assert logits_TE.grad[kept.k_T == 2].abs().sum() > 0
    assert logits_TE.grad[kept.k_T < 2].abs().max() < 1e-6, "one expert alone has weight 1, and no gradient"


# --- policies --------------------------------------------------------------------------------------------------------


def halves(routing, kept):
    """Drop rates of the first and of the second half of the batch."""
    dropped_T = (routing.k_T - kept.k_T).float()
    half = len(dropped_T) // 2
    return float(dropped_T[:half].mean()), float(dropped_T[half:].mean())


def test_random_token_selection_removes_the_bias_of_position():
    """R10 (Capped): dropping by position is all in the second half, and random dropping is the same in both."""
    by_position, by_chance, total = [], [], []
    for seed in range(0, 20, 2):
        routing = linear_router(seed=seed)
        kinds = ("ffn",) * 16
        position = limit(routing, kinds, CapacityRule(1.0))
        chance = limit(routing, kinds, CapacityRule(1.0, policy="random"), context(seed))
        assert torch.equal(position.counts_E, chance.counts_E), "how many are dropped does not depend on the policy"
        by_position.append(halves(routing, position))
        by_chance.append(halves(routing, chance))
        total.append(1 - len(position.token_N) / 4096)
    first, second = (sum(side) / 10 for side in zip(*by_position, strict=True))
    chance_first, chance_second = (sum(side) / 10 for side in zip(*by_chance, strict=True))
    assert first < 0.002
    assert second == pytest.approx(0.216, abs=0.02)
    assert chance_first == pytest.approx(chance_second, abs=0.01)
    assert chance_first == pytest.approx(0.108, abs=0.01)
    assert sum(total) / 10 == pytest.approx(0.108, abs=0.01)


def test_probs_keeps_the_surest():
    routing = linear_router(512, 4)
    kept = limit(routing, ("ffn",) * 4, CapacityRule(0.5, policy="probs"))
    sure_TE = routing.to_dense()
    for expert in range(4):
        kept_values = kept.weight_N[kept.expert_N == expert]
        all_values = sure_TE[:, expert][sure_TE[:, expert] > 0]
        torch.testing.assert_close(
            kept_values.sort(descending=True).values, all_values.sort(descending=True).values[:64]
        )


def test_probs_of_a_routing_without_probabilities_are_its_weights():
    routing = Routing.topk(torch.zeros(4, 1).long(), torch.tensor([[0.1], [0.4], [0.2], [0.3]]), 1)
    assert pairs_of(limit(routing, ("ffn",), CapacityRule(0.5, policy="probs"))) == {(1, 0), (3, 0)}


def test_random_needs_a_generator_and_follows_it():
    routing = linear_router(256, 4)
    rule = CapacityRule(0.5, policy="random")
    with pytest.raises(ValueError, match="needs rng in the Context"):
        limit(routing, ("ffn",) * 4, rule, Context())
    first, again, other = (pairs_of(limit(routing, ("ffn",) * 4, rule, context(seed))) for seed in (1, 1, 2))
    assert first == again != other


# --- how many --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("factor", "k", "tokens", "experts", "slots"),
    [
        (1.0, 1, 64, 8, 8),
        (1.25, 1, 64, 8, 10),
        (1.25, 1, 65, 8, 11),
        (1.0, 2, 100, 3, 67),
        (1.1, 1, 100, 10, 11),
        (0.7, 1, 10, 7, 1),
    ],
)
def test_slots_are_rounded_up_from_the_exact_number(factor, k, tokens, experts, slots):
    found_GE = CapacityRule(factor, k).slots(torch.tensor([tokens]), ("ffn",) * experts)
    assert found_GE.tolist() == [[slots] * experts]
    assert slots == math.ceil(Fraction(str(factor)) * k * tokens / experts)


@pytest.mark.parametrize("tau", [0.25, 0.75])
def test_kinds_of_moepp_share_gamma_times_all_assignments(tau):
    """R5 (MoEPlusPlus): the capacities add up to gamma k T (each rounded up by less than one)."""
    kinds = ("ffn",) * 8 + ("constant",) * 2 + ("copy", "zero")
    slots_E = CapacityRule(1.1, 2, tau=tau).slots(torch.tensor([4000]), kinds)[0]
    assert 1.1 * 2 * 4000 <= int(slots_E.sum()) < 1.1 * 2 * 4000 + len(kinds)
    assert float(slots_E[0] / slots_E[-1]) == pytest.approx(tau, abs=0.002)


def test_eq_8_as_printed_overflows_in_perfect_balance():
    """R5 (MoEPlusPlus): with T in place of k T at least 45 % of the assignments find no place at gamma = 1.1."""
    tokens, experts = 400, 8
    routing = Routing.topk(torch.arange(tokens * 2).reshape(tokens, 2) % experts, torch.ones(tokens, 2), experts)
    dropped = [1 - len(limit(routing, ("ffn",) * experts, CapacityRule(1.1, k)).token_N) / (2 * tokens) for k in (1, 2)]
    assert dropped == [pytest.approx(0.45), 0.0]


def test_padding_takes_no_capacity():
    routing = linear_router(64, 4)
    valid_T = torch.arange(64) % 2 == 0
    masked = routing.keep(valid_T[routing.token_N])
    kept = limit(masked, ("ffn",) * 4, CapacityRule(1.0), Context(valid_T=valid_T))
    alone = limit(of_logits(routing.logits_TE[valid_T]), ("ffn",) * 4, CapacityRule(1.0))
    assert torch.equal(kept.to_dense()[valid_T], alone.to_dense())


def test_capacity_of_each_segment_is_its_own():
    """As in transformers' Switch: the same as each sequence alone, and other than in the batch."""
    logits_TE = seeded(96, 4, seed=7)
    segment_T = torch.tensor([0] * 32 + [1] * 64)
    kinds, rule = ("ffn",) * 4, CapacityRule(1.0, per_segment=True)
    kept = limit(of_logits(logits_TE), kinds, rule, Context(segment_T=segment_T)).to_dense()
    apart = [limit(of_logits(logits_TE[segment_T == s]), kinds, CapacityRule(1.0)).to_dense() for s in (0, 1)]
    assert torch.equal(kept, torch.cat(apart))
    assert not torch.equal(kept, limit(of_logits(logits_TE), kinds, CapacityRule(1.0)).to_dense())


def test_factor_may_follow_progress():
    rule = CapacityRule(Schedule(2.0, 1.0))
    counts = [int(rule.slots(torch.tensor([64]), ("ffn",) * 8, progress)[0, 0]) for progress in (0.0, 0.5, 1.0)]
    assert counts == [16, 12, 8]


@pytest.mark.parametrize("wrong", [{"k": 0}, {"tau": 0.0}, {"least": -1}])
def test_impossible_rules_are_refused(wrong):
    with pytest.raises(ValueError, match="must be at least 1"):
        CapacityRule(**wrong)
    with pytest.raises(ValueError, match="leaves no slots"):
        CapacityRule(0.0).slots(torch.tensor([4]), ("ffn",))


# --- the wrapper -----------------------------------------------------------------------------------------------------


def wrapped(rule, k=2):
    router = Pipeline(Linear(seeded(8, 16, seed=8)), TopK(k), Softmax())
    return with_capacity(RouterBundle(router, ("ffn",) * 8), rule).router


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("first_choices", [False, True])
def test_wrapper_is_causal_only_where_it_says_so(policy, first_choices):
    router = wrapped(CapacityRule(0.75, 2, policy, first_choices))
    x_TH = seeded(64, 16, seed=9)
    before_TE = router(x_TH, context()).to_dense()
    x_TH[32:] = seeded(32, 16, seed=10) * 3
    after_TE = router(x_TH, context()).to_dense()
    assert router.causal == torch.equal(before_TE[:32], after_TE[:32])


def test_wrapper_declares_what_it_reads():
    assert wrapped(CapacityRule(policy="random")).needs == {"rng"}
    assert wrapped(CapacityRule(per_segment=True)).needs == {"segment_T"}
    assert wrapped(CapacityRule()).needs == frozenset()


def test_wrapper_keeps_parameters_and_hands_updates_on():
    class Counting(Router):
        scope = "model"
        seen = 0

        def forward(self, x_TH, ctx):
            return linear_router(len(x_TH), 4)

        def update(self, routing, signal=None):
            self.seen += len(routing.token_N)

    router = Capacity(Counting(), ("ffn",) * 4, CapacityRule(0.5))
    routing = router(torch.zeros(64, 2), Context())
    router.update(routing)
    assert router.router.seen == len(routing.token_N) <= 32
    assert router.scope == "model"
    assert [name for name, _ in wrapped(CapacityRule()).named_parameters()] == ["router.scorer.weight_EH"]


def test_per_segment_is_the_capacity_of_transformers_switch():
    modeling = pytest.importorskip("transformers.models.switch_transformers.modeling_switch_transformers")
    config = pytest.importorskip("transformers").SwitchTransformersConfig(
        d_model=16, num_experts=4, expert_capacity=6, router_jitter_noise=0.0, router_bias=False
    )
    theirs = modeling.SwitchTransformersTop1Router(config).eval()
    x_BSH = seeded(3, 20, 16, seed=11)
    with torch.no_grad():
        theirs.classifier.weight.copy_(seeded(4, 16, seed=12))
        mask_BSE, weight_BS1, logits_BSE = theirs(x_BSH)
    rule = CapacityRule(6 * 4 / 20, per_segment=True)
    ctx = Context(segment_T=torch.arange(3).repeat_interleave(20))
    ours = limit(of_logits(logits_BSE.flatten(0, 1)), ("ffn",) * 4, rule, ctx)
    assert 0 < len(ours.token_N) < 60
    torch.testing.assert_close(ours.to_dense(), (mask_BSE * weight_BS1).flatten(0, 1))


@pytest.mark.parametrize("tau", [Fraction(1, 4), Fraction(3, 4), Fraction(1)])
@pytest.mark.parametrize("others", [4, 8])
def test_capacities_add_up_to_gamma_times_the_assignments(tau, others):
    """R5 (MoEPlusPlus), exactly, in rational numbers."""
    gamma = Fraction(11, 10)
    of_ffn, of_other = capacities(1000, 2, tau, 16, others, gamma)
    assert 16 * of_ffn + others * of_other == gamma * 2 * 1000
    assert of_ffn == tau * of_other


def test_a_scheduled_factor_needs_the_progress():
    assert "progress" in wrapped(CapacityRule(Schedule(2.0, 1.0))).needs
    assert "progress" not in wrapped(CapacityRule(2.0)).needs
