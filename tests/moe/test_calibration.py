"""Router-aware calibration: what matrices really read, balanced sampling, sensitivities and scores of experts."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moebench.contracts import MoebenchError
from moebench.moe.bits.balanced import draw_balanced, extra_traffic
from moebench.moe.bits.calibration import calibrate, calibrate_routed
from moebench.moe.bits.cosine_predictor import fit_predictor
from moebench.moe.bits.params import CosinePredictor
from moebench.moe.bits.scores import block_cosine, expert_outlier_scores, outlier_score, token_cosines
from moebench.moe.bits.sensitivity import sensitivities
from moebench.moe.channels import SiteRule, Sparsity
from moebench.moe.experts import ExpertStore
from moebench.moe.layer import PreparedLayer, SharedExpert, ffn_hidden, moe_forward
from moebench.moe.plugins import Int8
from moebench.moe.quantization import coded
from moebench.moe.router import Linear, Pipeline, Softmax, TopK
from moebench.moe.routing import Context, Routing

H, F, T, K = 8, 6, 40, 2
KINDS = ("ffn", "zero", "ffn", "ffn", "ffn")
CHOICES = (1, 2, 3)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_store(sparsity=None):
    return ExpertStore(randn(4, 2 * F, H, seed=1), randn(4, H, F, seed=2), KINDS, sparsity=sparsity)


def make_router(renormalize=True, k=K):
    return Pipeline(Linear(randn(len(KINDS), H, seed=3)), TopK(k), Softmax(renormalize=renormalize))


# --- calibration -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [None, Sparsity({"input": SiteRule(0.5), "hidden": SiteRule(0.2)})])
def test_calibration_is_the_sum_over_tokens_and_experts(sparsity):
    store, router, x_TH = make_store(sparsity), make_router(), randn(T, H)
    made = calibrate(store, router, x_TH)
    routing = router(x_TH, Context())
    for slot, expert in enumerate(store.ffn_ids):
        entries = [n for n in range(len(routing.token_N)) if routing.expert_N[n] == expert]
        read = [x_TH[routing.token_N[n]] for n in entries]
        read = read if sparsity is None else [sparsity.apply("input", row) for row in read]
        hidden = list(ffn_hidden(torch.stack(read), store.gate_up[slot], "silu"))
        hidden = hidden if sparsity is None else [sparsity.apply("hidden", row) for row in hidden]
        for stats, rows in ((made.gate_up[slot], read), (made.down[slot], hidden)):
            moment = sum(torch.outer(row.double(), row.double()) for row in rows)
            torch.testing.assert_close(stats.second_moment_II, moment, rtol=1e-12, atol=1e-12)
            assert torch.equal(stats.absmax_I, torch.stack(rows).abs().amax(0))
            torch.testing.assert_close(stats.mean_abs_I, sum(row.abs().double() for row in rows).float() / len(rows))
            assert stats.tokens == len(rows) == made.counts_E[expert]
            assert stats.weight == pytest.approx(sum(routing.weight_N[n].item() for n in entries), rel=1e-6)


def test_shares_are_of_the_weights_before_they_are_renormalised():
    store, x_TH = make_store(), randn(T, H)
    made = calibrate(store, make_router(), x_TH)
    probs_TE = (x_TH @ randn(len(KINDS), H, seed=3).T).softmax(-1).double()
    top = probs_TE.topk(K).indices
    kept_TE = torch.zeros_like(probs_TE).scatter(1, top, probs_TE.gather(1, top))
    torch.testing.assert_close(made.share_E, kept_TE.sum(0) / kept_TE.sum(), rtol=1e-6, atol=0)
    used_TE = kept_TE / kept_TE.sum(1, keepdim=True)
    torch.testing.assert_close(made.used_E, used_TE.sum(0), rtol=1e-6, atol=0)
    assert not torch.allclose(made.share_E, made.used_E / made.used_E.sum())
    assert made.counts_E.sum() == T * K


def test_an_expert_without_tokens_has_statistics_of_zeros():
    routing = Routing.topk(torch.tensor([[0], [0]]), torch.ones(2, 1), len(KINDS))
    made = calibrate_routed(make_store(), [(routing, randn(2, H))])
    for stats, width in ((made.gate_up[3], H), (made.down[3], F)):
        assert (stats.tokens, stats.weight) == (0, 0.0)
        assert torch.equal(stats.second_moment_II, torch.zeros(width, width, dtype=torch.float64))
        assert torch.equal(stats.absmax_I, torch.zeros(width))
        assert torch.equal(stats.mean_abs_I, torch.zeros(width))


def test_second_moments_are_kept_where_they_are_asked_for_and_nothing_else_changes():
    store, router, x_TH = make_store(None), make_router(), randn(T, H)
    full, bare = (calibrate(store, router, x_TH, moments=moments) for moments in (True, False))
    for part in ("gate_up", "down"):
        for one, other in zip(getattr(full, part), getattr(bare, part), strict=True):
            assert one.second_moment_II is not None
            assert other.second_moment_II is None
            assert torch.equal(one.absmax_I, other.absmax_I)
            assert torch.equal(one.mean_abs_I, other.mean_abs_I)
            assert (one.tokens, one.weight) == (other.tokens, other.weight)


def test_calibration_refuses_what_has_no_dense_ffn():
    quantized = coded(Int8())(make_store(), None)
    with pytest.raises(MoebenchError, match="quantized experts cannot be calibrated"):
        calibrate(quantized, make_router(), randn(T, H))
    attentions = ExpertStore(randn(1, 3 * H, H), randn(1, H, H), ("sequence",), heads=2)
    routing = Routing.topk(torch.zeros(T, 1, dtype=torch.long), torch.ones(T, 1), 1)
    with pytest.raises(MoebenchError, match="kind 'sequence' cannot be calibrated"):
        calibrate_routed(attentions, [(routing, randn(T, H))])


# --- balanced sampling -----------------------------------------------------------------------------------------------

ids = st.lists(st.lists(st.integers(0, 4), min_size=2, max_size=2, unique=True), min_size=1, max_size=30)


@settings(deadline=None, max_examples=80)
@given(ids, ids, st.sampled_from([0.25, 0.5, 1.0, 2.0]), st.integers(0, 9))
def test_every_expert_gets_its_share_or_all_candidates_of_its_own(base, more, ratio, seed):
    # id 4 is an empty slot of a layer of four experts
    base_TK, more_CK = torch.tensor(base), torch.tensor(more)
    sample = draw_balanced(base_TK, more_CK, 4, ratio, seed)
    again = draw_balanced(base_TK, more_CK, 4, ratio, seed)
    assert torch.equal(sample.token_S, again.token_S)
    drawn = sample.token_S.tolist()
    assert len(set(drawn)) == len(drawn)
    own = [sum(row.count(expert) for row in base) for expert in range(4)]
    assert sample.wanted == math.ceil(ratio * sum(own) / 4)
    for expert in range(4):
        starved = own[expert] < sample.wanted
        assert bool(sample.starved_E[expert]) == starved
        extra = sum(expert in more[token] for token in drawn)
        assert sample.counts_E[expert] == own[expert] + (extra if starved else 0)
        available = own[expert] + sum(expert in row for row in more)
        assert (expert in sample.short) == (available < sample.wanted)
        if expert in sample.short:
            assert sample.counts_E[expert] == available
        else:
            assert sample.counts_E[expert] >= sample.wanted
    assert all(any(sample.starved_E[e] for e in more[token] if e < 4) for token in drawn)
    assert bool(sample.reason) == bool(sample.short)


def test_seeds_draw_other_tokens_and_no_more_than_are_wanted():
    base, more = torch.zeros(20, 1, dtype=torch.long), torch.ones(100, 1, dtype=torch.long)
    one, other = (draw_balanced(base, more, 2, 0.5, seed) for seed in (1, 2))
    assert one.wanted == len(one.token_S) == len(other.token_S) == 5
    assert set(one.token_S.tolist()) != set(other.token_S.tolist())


def test_a_share_that_cannot_be_reached_is_said():
    sample = draw_balanced(torch.tensor([[0], [0]]), torch.tensor([[1]]), 3, 1.0)
    assert sample.short == (2,)
    assert sample.reason == (
        "1 of 3 experts have fewer than 1 calibration tokens, all candidates of theirs included: 2; "
        "give more candidates."
    )
    with pytest.raises(ValueError, match="ratio=0 must be a positive number"):
        draw_balanced(torch.tensor([[0]]), torch.tensor([[1]]), 3, 0.0)


def test_extra_tokens_reach_the_starved_expert_alone_and_leave_the_counts_alone():
    store, x_TH, more_CH = make_store(), randn(4, H), randn(6, H, seed=9)
    base = Routing.topk(torch.tensor([[0, 2]] * 4), torch.full((4, 2), 0.5), len(KINDS))
    more = Routing.topk(torch.tensor([[0, 3]] * 6), torch.full((6, 2), 0.25), len(KINDS))
    sample = draw_balanced(base.padded()[0], more.padded()[0], len(KINDS), 1.0, seed=4)
    assert sample.wanted == 2
    extra = extra_traffic(sample, more)
    assert set(extra.expert_N.tolist()) == {3}
    assert sorted(extra.token_N.tolist()) == sorted(sample.token_S.tolist())
    plain = calibrate_routed(store, [(base, x_TH)])
    made = calibrate_routed(store, [(base, x_TH), (extra, more_CH)])
    assert torch.equal(made.counts_E, plain.counts_E)
    assert torch.equal(made.share_E, plain.share_E)
    assert [stats.tokens for stats in made.gate_up] == [4, 4, 2, 0]
    rows = more_CH[extra.token_N].double()
    torch.testing.assert_close(made.gate_up[2].second_moment_II, rows.T @ rows)
    assert made.gate_up[2].weight == 0.5
    assert torch.equal(made.gate_up[0].second_moment_II, plain.gate_up[0].second_moment_II)


# --- sensitivities and scores ----------------------------------------------------------------------------------------


def fake_encode(weight, bits):
    step = float(weight.abs().max()) / 2 ** (bits - 1)
    return (weight / step).round() * step


@pytest.mark.parametrize("sparsity", [None, Sparsity({"hidden": SiteRule(0.2)})])
def test_sensitivities_are_those_of_the_whole_layer_run_again(sparsity):
    store, x_TH = make_store(sparsity), randn(T, H).double()
    router = make_router()
    shared = SharedExpert(randn(4, H, seed=7), randn(H, 2, seed=8), gate_H=randn(H, seed=9))
    found = sensitivities(store, router, x_TH, fake_encode, CHOICES)
    layer = PreparedLayer(store, router, shared)
    with torch.no_grad():
        before = moe_forward(layer, x_TH)
        for slot, place in itertools.product(range(4), range(3)):
            gate_up, down = store.gate_up.double().clone(), store.down.double().clone()
            gate_up[slot] = fake_encode(gate_up[slot], CHOICES[place])
            down[slot] = fake_encode(down[slot], CHOICES[place])
            coded = ExpertStore(gate_up, down, KINDS, sparsity=sparsity)
            off = (moe_forward(PreparedLayer(coded, router, shared), x_TH) - before).norm()
            assert float(found[slot, place]) == pytest.approx(float(off), rel=1e-10)
    assert bool((found > 0).all())
    assert found.shape == (4, 3)


def test_an_expert_without_tokens_is_not_sensitive():
    def none_but(weight, bits):
        return weight * 0

    router = Pipeline(Linear(torch.eye(len(KINDS), H)), TopK(1), Softmax())
    found = sensitivities(make_store(), router, torch.eye(H)[:1], none_but, (2,))
    assert found[0, 0] > 0
    assert torch.equal(found[1:], torch.zeros(3, 1, dtype=torch.float64))


def test_outlier_score_by_hand():
    weight = torch.tensor([[1.0, 0.0, -3.0], [1.0, -6.0, 1.0], [1.0, 0.0, 2.0]])
    # columns: max / mean = 1 / 1, 6 / 2, 3 / 2
    assert outlier_score(weight) == 3.0
    assert outlier_score(torch.zeros(3, 3)) == 0.0


def test_an_expert_scores_as_its_worst_linear_map():
    # gate and up apart: the 3 of up would be 3 / 1.5 = 2 in one matrix of four rows, 3 / 2 alone
    gate_up = torch.tensor([[[1.0], [1.0], [3.0], [1.0]]])
    down = torch.tensor([[[1.0, 1.0]]])
    assert expert_outlier_scores(ExpertStore(gate_up, down, ("ffn",))) == (1.5,)
    assert expert_outlier_scores(ExpertStore(gate_up[:, :2], down, ("ffn",), gated=False)) == (1.0,)


def test_block_cosine_is_the_mean_over_tokens():
    x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    y = torch.tensor([[3.0, 0.0], [1.0, 1.0]])
    assert block_cosine(x, y) == pytest.approx((1 + 0.5**0.5) / 2)


def test_the_predictor_learns_what_a_block_does_and_is_the_same_again():
    x_TH = randn(600, H)
    turned = x_TH + 2 * torch.relu(x_TH @ randn(H, H, seed=5))
    cosine_T = token_cosines(x_TH, turned)
    params = CosinePredictor(width=32, lr=1e-2, epochs=20, batch=64)
    fitted, again = (fit_predictor(x_TH, cosine_T, params, seed=1) for _ in range(2))
    assert fitted.held_out_error < 0.5 * fitted.held_out_variance
    assert fitted.predictor.score(x_TH) == again.predictor.score(x_TH)
    assert fitted.predictor.score(x_TH) == pytest.approx(float(cosine_T.mean()), abs=0.1)
    noise_T = randn(600, seed=6).tanh()
    noise = fit_predictor(x_TH, noise_T, CosinePredictor(width=32, lr=1e-2, patience=2, batch=64), seed=1)
    assert noise.epochs < 100
    judged = torch.randperm(600, generator=torch.Generator().manual_seed(1))[:60]
    kept = (noise.predictor(x_TH[judged]) - noise_T[judged]).square().mean()
    assert noise.held_out_error == pytest.approx(kept.item(), rel=1e-5)  # the best epoch's, not the last one's


def test_the_predictor_refuses_what_it_cannot_learn_from():
    with pytest.raises(ValueError, match="1 tokens cannot be split"):
        fit_predictor(randn(1, H), torch.ones(1), CosinePredictor(), seed=0)
    with pytest.raises(ValueError, match="contain NaN"):
        fit_predictor(randn(9, H), torch.full((9,), math.nan), CosinePredictor(), seed=0)
