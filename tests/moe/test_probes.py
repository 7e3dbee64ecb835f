"""What profilers compute: definitions by another way, identities, and cases in which they must see a difference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moebench.moe.dropping import dropped, of_layer
from moebench.moe.probes.dictionary import (
    Dictionary,
    Recipe,
    by_principal,
    by_random,
    principal,
    resample,
    train,
)
from moebench.moe.probes.flow import carrying, overlap
from moebench.moe.probes.information import against_chance, counts, normalised, parts_moved, rotated
from moebench.moe.probes.lazy import active_share, largest, nonzero_share
from moebench.moe.probes.super_experts import Criterion, forming_layers, random_set, super_experts, told
from moebench.moe.probes.voids import Adaptive, decided, jensen_shannon, matched, uniform
from moebench.moe.routing import Routing

seeds = st.integers(0, 2**20)


def rng(seed):
    return torch.Generator().manual_seed(seed)


# --- super experts ---------------------------------------------------------------------------------------------------


def peaks(layers=30, experts=12):
    return torch.rand(layers, experts, generator=rng(0))


def test_the_official_rule_and_the_decoy_in_a_late_layer():
    peaks_LE = peaks()
    peaks_LE[11, 9], peaks_LE[11, 11], peaks_LE[28, 5] = 17947.0, 6619.0, 20000.0
    found = super_experts(peaks_LE, range(30), 30, Criterion())
    assert found == [(11, 9), (11, 11)]
    assert told(found) == ["11:9", "11:11"]
    assert (28, 5) in super_experts(peaks_LE, range(30), 30, Criterion(depth=1.0))
    assert super_experts(peaks_LE, range(30), 30, Criterion(), forming=[12]) == []


def test_a_tenth_of_the_largest_is_wanted_besides_the_quantile():
    peaks_LE = peaks()
    peaks_LE[3, 1], peaks_LE[4, 2] = 1000.0, 99.0
    assert super_experts(peaks_LE, range(30), 30, Criterion(quantile=0.99)) == [(3, 1)]
    assert super_experts(peaks_LE, range(30), 30, Criterion(quantile=0.99, fraction=0.05)) == [(3, 1), (4, 2)]


def test_rows_are_named_by_their_layers():
    peaks_LE = torch.tensor([[1.0, 2.0], [3.0, 500.0]])
    assert super_experts(peaks_LE, [4, 7], 16, Criterion(quantile=0.5)) == [(7, 1)]
    with pytest.raises(ValueError, match="raise depth"):
        super_experts(peaks_LE, [14, 15], 16, Criterion())


@given(seeds)
@settings(max_examples=20, deadline=None)
def test_random_sets_are_others_of_the_same_layers(seed):
    super_ = [(2, 0), (2, 3)]
    drawn = random_set(super_, range(8), 4, seed, 8, Criterion())
    assert len(set(drawn)) == 2
    assert not set(drawn) & set(super_)
    assert all(layer < 6 for layer, _ in drawn)
    assert drawn == random_set(super_, range(8), 4, seed, 8, Criterion())


def test_layers_that_form_massive_activations():
    largest_L, median_L = [1.0, 3000.0, 3010.0, 2900.0, 20.0], [0.5, 0.5, 0.5, 0.5, 0.5]
    assert forming_layers(largest_L, median_L) == [1]
    assert forming_layers([90.0, 95.0], [0.01, 0.01]) == []


def test_dropping_takes_entries_and_leaves_weights():
    gate_TE = torch.rand(6, 4, generator=rng(1)) + 0.1
    routing = Routing.dense(gate_TE)
    assert torch.equal(dropped(routing, ()).to_dense(), gate_TE)
    expected_TE = gate_TE.clone()
    expected_TE[:, [1, 3]] = 0
    assert torch.equal(dropped(routing, {1, 3}).to_dense(), expected_TE)
    assert of_layer(["11:9", "1:19", "11:2"], 11) == {9, 2}


# --- voids -----------------------------------------------------------------------------------------------------------


@given(seeds, st.floats(0, 1.5))
@settings(max_examples=40, deadline=None)
def test_adaptive_is_the_definition(seed, alpha):
    change_LT = torch.randn(7, 5, generator=rng(seed)).double()
    lac = Adaptive(alpha)
    active_LT = torch.stack([lac.active(change_T) for change_T in change_LT])
    for token in range(5):
        assert active_LT[:, token].tolist() == decided(change_LT[:, token].tolist(), alpha)


def test_the_first_two_layers_have_threshold_zero():
    assert decided([0.0, 0.0], 0.8) == [True, True]
    assert decided([-0.1, 1.0, 0.5, 0.9], 0.8) == [False, True, False, True]


@given(seeds)
@settings(max_examples=20, deadline=None)
def test_more_alpha_is_less_usage(seed):
    change_LT = torch.randn(9, 6, generator=rng(seed)).double()

    def usage(alpha):
        lac = Adaptive(alpha)
        return torch.stack([lac.active(change_T) for change_T in change_LT])

    assert bool((usage(0.8) <= usage(0.2)).all())


@given(seeds)
@settings(max_examples=20, deadline=None)
def test_random_skippings_keep_their_counts(seed):
    active_LT = torch.rand(5, 11, generator=rng(seed)) < 0.4
    assert torch.equal(matched(active_LT, seed).sum(1), active_LT.sum(1))
    assert uniform(active_LT, seed).sum() == active_LT.sum()


def test_divergence_of_profiles():
    p_L, q_L = torch.tensor([1.0, 1.0, 0.0]), torch.tensor([0.0, 0.0, 3.0])
    assert jensen_shannon(p_L, 5 * p_L) == pytest.approx(0, abs=1e-12)
    assert jensen_shannon(p_L, q_L) == pytest.approx(1)
    both = torch.tensor([0.3, 0.7]), torch.tensor([0.6, 0.4])
    assert jensen_shannon(*both) == pytest.approx(jensen_shannon(*reversed(both)))


# --- lazy neurons, flow, information ---------------------------------------------------------------------------------


@given(seeds, st.integers(1, 12))
@settings(max_examples=20, deadline=None)
def test_the_largest_are_kept(seed, k):
    hidden_TF = torch.randn(4, 12, generator=rng(seed)).relu() + 0.01
    kept_TF = largest(hidden_TF, k)
    assert bool(((kept_TF != 0).sum(1) == k).all())
    assert torch.equal(kept_TF[kept_TF != 0], hidden_TF[kept_TF != 0])
    assert torch.equal(largest(hidden_TF, 12), hidden_TF)
    assert float(kept_TF.sum()) == pytest.approx(float(hidden_TF.topk(k, dim=1).values.sum()))


def test_shares_of_activations():
    hidden_TF = torch.tensor([[0.0, 0.0, -2.0, 0.1], [0.0, 1.0, 1.0, 1.0]])
    assert nonzero_share(hidden_TF) == 5 / 8
    assert active_share(hidden_TF, 0.1) == 4 / 8
    assert active_share(torch.zeros(2, 3), 0.1) == 0


@given(seeds, st.floats(0.05, 0.95))
@settings(max_examples=30, deadline=None)
def test_no_smaller_set_carries_the_share(seed, share):
    h_TH = torch.randn(5, 16, generator=rng(seed))
    for row_H, kept_H in zip(h_TH.double().abs(), carrying(h_TH, share), strict=True):
        chosen = row_H[kept_H]
        assert float(chosen.sum()) >= share * float(row_H.sum()) - 1e-9
        assert float(chosen.sum() - chosen.min()) < share * float(row_H.sum())
        assert float(chosen.min()) >= float(row_H[~kept_H].max())


def test_overlap_is_jaccard():
    first = torch.tensor([[True, True, False], [False, False, False]])
    second = torch.tensor([[True, False, True], [False, False, False]])
    assert overlap(first, second) == pytest.approx((1 / 3 + 1) / 2)


def dealt_anew(label_T, generator):
    return label_T[torch.randperm(len(label_T), generator=generator)]


def test_experts_that_follow_the_topics_of_a_text_do_not_pass_for_experts_of_places():
    label_T = torch.arange(8).repeat_interleave(32).repeat(4)  # 4 windows of 8 parts of 32 tokens
    chances = []
    for seed in range(20):
        topic_T = torch.randint(8, (32,), generator=rng(seed)).repeat_interleave(32)
        args = (label_T, topic_T[:, None], 8, 8, 20, seed)
        assert against_chance(*args, dealt_anew).p == pytest.approx(1 / 21)  # what an invalid null says
        chances.append(against_chance(*args, parts_moved(256, 8)).p)
    assert sum(p < 0.1 for p in chances) <= 6
    assert sum(chances) / 20 > 0.3


@given(seeds, st.integers(1, 40))
@settings(max_examples=30, deadline=None)
def test_shuffles_keep_how_often_each_window_has_a_label(seed, tokens):
    label_T = torch.arange(tokens) % 16 * 4 // 16
    moved_T, turned_T = parts_moved(16, 4)(label_T, rng(seed)), rotated(16)(label_T, rng(seed))
    for own_T, part_T, round_T in zip(*(torch.split(x, 16) for x in (label_T, moved_T, turned_T)), strict=True):
        assert torch.equal(round_T.sort().values, own_T)
        assert set(part_T.tolist()) == set(own_T.tolist())
        assert torch.equal(part_T[1:] == part_T[:-1], own_T[1:] == own_T[:-1])
        assert any(torch.equal(round_T, own_T.roll(by)) for by in range(len(own_T)))


def test_information_of_dependent_and_independent_labels():
    label_T = torch.arange(4).repeat(50)
    whole = against_chance(label_T, label_T[:, None], 4, 4, 50, 0, dealt_anew)
    assert whole.nmi == pytest.approx(1)
    assert whole.p == pytest.approx(1 / 51)
    free_T = torch.randint(4, (200,), generator=rng(3))
    chance = against_chance(label_T, free_T[:, None], 4, 4, 50, 0, dealt_anew)
    assert chance.nmi < 0.1
    assert abs(chance.nmi - chance.null) < 0.05
    assert chance.p > 0.02


@given(seeds)
@settings(max_examples=20, deadline=None)
def test_information_is_symmetric_and_counts_every_slot(seed):
    label_T = torch.randint(3, (40,), generator=rng(seed))
    expert_TK = torch.randint(6, (40, 2), generator=rng(seed + 1))  # 5 is an empty slot
    joint_CE = counts(label_T, expert_TK, 3, 5)
    assert int(joint_CE.sum()) == int((expert_TK < 5).sum())
    assert normalised(joint_CE) == pytest.approx(normalised(joint_CE.T), abs=1e-12)


# --- dictionaries ----------------------------------------------------------------------------------------------------


def sparse_tokens(tokens=400, width=12, entries=24, k=2, seed=0):
    """Tokens that are sums of k of some unit vectors."""
    atom_SD = torch.nn.functional.normalize(torch.randn(entries, width, generator=rng(seed)), dim=1)
    chosen_TK = torch.rand(tokens, entries, generator=rng(seed + 1)).topk(k, dim=1).indices
    return 3 * atom_SD[chosen_TK].sum(1)


def test_a_dictionary_learns_what_is_sparse():
    x_TD = sparse_tokens()
    model, losses = train(x_TD, Recipe(48, 0.1, 400, 64, 5e-3), seed=0)
    assert losses[-1] < losses[0] / 2
    assert float((model.decoder_SD.norm(dim=1) - 1).abs().max()) < 1e-5
    with torch.no_grad():
        f_TS = model.encode(x_TD)
        components = max(1, round(float((f_TS > 0).double().sum(1).mean())))
        error = float((model.decode(f_TS) - x_TD).square().sum())
    mean_D, direction_KD, _ = principal(x_TD, min(components, 4))
    assert error < float((by_principal(x_TD, mean_D, direction_KD) - x_TD).square().sum())


def test_the_projected_gradient_is_orthogonal_to_the_rows():
    model = Dictionary(6, 9, rng(0))
    model.loss(torch.randn(20, 6, generator=rng(1)), 0.1).backward()
    model.project_gradient()
    along_S = (model.decoder_SD.grad * model.decoder_SD).sum(1)
    assert float(along_S.detach().abs().max()) < 1e-5


def test_only_dead_entries_are_made_anew():
    model = Dictionary(6, 9, rng(0))
    optimizer = torch.optim.Adam(model.parameters())
    x_TD = torch.randn(20, 6, generator=rng(1))
    model.loss(x_TD, 0.1).backward()
    optimizer.step()
    before = model.decoder_SD.detach().clone()
    dead_S = torch.arange(9) < 2
    resample(model, optimizer, dead_S, x_TD, torch.ones(20), rng(2))
    assert torch.equal(model.decoder_SD[2:], before[2:])
    assert not torch.equal(model.decoder_SD[:2], before[:2])
    assert float(optimizer.state[model.encoder_DS]["exp_avg"][:, :2].abs().max()) == 0
    assert float(optimizer.state[model.encoder_DS]["exp_avg"][:, 2:].abs().max()) > 0


def test_principal_components_lose_the_other_variances():
    x_TD = torch.randn(50, 7, generator=rng(4)) * torch.arange(1, 8)
    mean_D, direction_KD, variance_D = principal(x_TD, 3)
    lost = (by_principal(x_TD, mean_D, direction_KD) - x_TD).square().sum(1).mean()
    assert float(lost) == pytest.approx(float(variance_D[3:].sum()))
    assert float((by_principal(x_TD, mean_D, principal(x_TD, 7)[1]) - x_TD).abs().max()) < 1e-5


def test_random_atoms_tell_what_least_squares_can():
    x_TD, atom_SD = torch.randn(9, 5, generator=rng(5)), torch.randn(20, 5, generator=rng(6)).double()
    zero_D = torch.zeros(5).double()
    assert float((by_random(x_TD, zero_D, atom_SD, 5) - x_TD).abs().max()) < 1e-6
    few = by_random(x_TD, zero_D, atom_SD, 2)
    chosen_TK = (x_TD.double() @ atom_SD.T).abs().topk(2, dim=1).indices
    left_TD = x_TD.double() - few
    assert float((left_TD[:, None] * atom_SD[chosen_TK]).sum(-1).abs().max()) < 1e-9
