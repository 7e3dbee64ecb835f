"""Slices of one MLP: together they are the MLP; who chooses them (tokens, sequences, units) and what that costs."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moebench.moe.experts import ExpertStore
from moebench.moe.layer import LayerWeights, PreparedLayer, ffn_hidden, moe_forward
from moebench.moe.routing import Context, Routing
from moebench.moe.slices import (
    DataSelection,
    ExpertSelection,
    HiddenGroups,
    mohd_forward,
    mohd_masked,
    sliced,
)

H, F, E, S, Q = 12, 32, 8, 10, 3
T = Q * S
SEGMENT_T = torch.arange(Q).repeat_interleave(S)
SEQUENCES = Context(segment_T=SEGMENT_T)


def seeded(*size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def mlp(gated=True, seed=0, activation="gelu"):
    rows = 2 * F if gated else F
    return LayerWeights(seeded(rows, H, seed=seed), seeded(H, F, seed=seed + 1), activation=activation, gated=gated)


def dense_forward(weights, x_TH):
    return ffn_hidden(x_TH, weights.gate_up, weights.activation, weights.gated) @ weights.down.T


def forward(parts, x_TH, routing):
    kinds = ("ffn",) * len(parts.down)
    store = ExpertStore(parts.gate_up, parts.down, kinds, parts.activation, parts.gated)
    return moe_forward(PreparedLayer(store, None), x_TH, routing=routing)


def selection(k=3, seed=5, **options):
    return DataSelection(seeded(E, H, seed=seed) * H**-0.5, k, **options)


# --- slices ----------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(st.sampled_from([1, 2, 4, 8, 16, 32]), st.booleans(), st.integers(0, 99))
def test_all_slices_together_are_the_mlp(slices, gated, seed):
    """R17 (UnionOfExperts): 2e-7 of the norm in float32 (2.7e-7 in the prototype)."""
    weights, x_TH = mlp(gated, seed), seeded(T, H, seed=seed + 7)
    y_TH = forward(sliced(weights, slices), x_TH, Routing.dense(torch.ones(T, slices)))
    wanted_TH = dense_forward(weights, x_TH)
    assert (y_TH - wanted_TH).norm() <= 1e-6 * wanted_TH.norm()


def test_a_slice_owns_its_channels():
    weights = mlp()
    parts = sliced(weights, E)
    assert torch.equal(parts.down[3], weights.down[:, 12:16])
    assert torch.equal(parts.gate_up[3], torch.cat([weights.gate_up[12:16], weights.gate_up[F + 12 : F + 16]]))


def test_what_cannot_be_sliced_is_refused():
    with pytest.raises(ValueError, match="slices=5 must divide the 32 channels"):
        sliced(mlp(), 5)
    with pytest.raises(ValueError, match="one dense MLP"):
        sliced(sliced(mlp(), 4), 2)


# --- UoE: slices choose tokens ---------------------------------------------------------------------------------------


def test_all_tokens_to_all_slices_are_the_mlp():
    weights, x_TH = mlp(), seeded(T, H, seed=1)
    routing = selection(k=E, keep=1.0, weighted=False)(x_TH, SEQUENCES)
    wanted_TH = dense_forward(weights, x_TH)
    assert (forward(sliced(weights, E), x_TH, routing) - wanted_TH).norm() <= 1e-6 * wanted_TH.norm()


@pytest.mark.parametrize("keep", [0.2, 0.5, 1.0])
def test_every_slice_takes_its_share_of_each_sequence(keep):
    """Expert FLOPs fall to ``keep``: every slice has int(keep * S) tokens of every sequence."""
    routing = selection(k=E, keep=keep)(seeded(T, H, seed=1), SEQUENCES)
    per_sequence = torch.zeros(Q, E, dtype=torch.int64)
    per_sequence.index_put_((SEGMENT_T[routing.token_N], routing.expert_N), torch.tensor(1), accumulate=True)
    assert (per_sequence == int(keep * S)).all()
    assert len(routing.token_N) == pytest.approx(keep * T * E)


def test_a_slice_prefers_the_tokens_that_it_likes():
    routing = selection(k=E, keep=0.5)(seeded(T, H, seed=1), SEQUENCES)
    taken_TE = routing.to_dense() > 0
    for segment in range(Q):
        mine = segment == SEGMENT_T
        for expert in range(E):
            probs_S, taken_S = routing.probs_TE[mine, expert], taken_TE[mine, expert]
            assert probs_S[taken_S].min() >= probs_S[~taken_S].max()


def test_only_the_best_slices_of_a_token_may_take_it():
    routing = selection(k=2, keep=1.0)(seeded(T, H, seed=1), SEQUENCES)
    assert (routing.k_T == 2).all()
    assert torch.equal(routing.weight_N, routing.probs_TE[routing.token_N, routing.expert_N])
    assert set(zip(routing.token_N.tolist(), routing.expert_N.tolist(), strict=True)) == {
        (token, expert) for token, row in enumerate(routing.probs_TE.topk(2).indices.tolist()) for expert in row
    }


def test_released_sum_without_the_gate_teaches_the_router_nothing():
    x_TH = seeded(T, H, seed=1)
    released, ours = selection(weighted=False), selection()
    assert not released(x_TH, SEQUENCES).weight_N.requires_grad
    ours(x_TH, SEQUENCES).weight_N.square().sum().backward()
    assert ours.scorer.weight_EH.grad.abs().max() > 0
    assert (released(x_TH, SEQUENCES).weight_N == 1).all()


def test_released_batch_norm_erases_the_gate_of_a_single_sequence():
    """Divided by the sum over the batch, a gate that is alone in it is 1, whatever it was."""
    x_TH = seeded(T, H, seed=1)
    released = selection(k=2, keep=1.0, batch_norm_epsilon=1e-6)
    weight_N = released(x_TH[:S], Context()).weight_N
    torch.testing.assert_close(weight_N, torch.ones_like(weight_N), atol=1e-4, rtol=0)
    plain_TE = selection(k=2, keep=1.0)(x_TH, SEQUENCES).to_dense()
    by_position_QSE = plain_TE.view(Q, S, E)
    wanted_QSE = by_position_QSE / (by_position_QSE.sum(0) + 1e-6) * Q
    torch.testing.assert_close(released(x_TH, SEQUENCES).to_dense(), wanted_QSE.view(T, E))


def test_slices_look_ahead_within_a_sequence_and_never_into_another():
    router, x_TH = selection(), seeded(T, H, seed=1)
    assert not router.causal
    before = router(x_TH, SEQUENCES).to_dense()
    x_TH[S - 4 : S] += 3
    after = router(x_TH, SEQUENCES).to_dense()
    assert not torch.equal(before[: S - 4], after[: S - 4])
    assert torch.equal(before[S:], after[S:])


def test_padding_is_taken_by_no_slice():
    valid_T = torch.arange(T) % S < 6
    routing = selection(k=E)(seeded(T, H, seed=1), replace(SEQUENCES, valid_T=valid_T))
    assert not routing.k_T[~valid_T].any()
    assert (routing.counts_E == Q * 3).all()


@pytest.mark.parametrize("options", [{"k": 0}, {"k": 9}, {"keep": 0.0}, {"keep": 1.5}])
def test_impossible_selections_are_refused(options):
    with pytest.raises(ValueError, match="must lie between 1 and the 8 slices"):
        selection(**options)


# --- UoE: sequences choose slices ------------------------------------------------------------------------------------


def test_a_sequence_goes_to_the_same_slices_as_a_whole():
    router = ExpertSelection(seeded(E, S * H) * (S * H) ** -0.5, 3)
    x_TH = seeded(T, H, seed=1)
    gate_QSE = router(x_TH, SEQUENCES).to_dense().view(Q, S, E)
    assert torch.equal(gate_QSE, gate_QSE[:, :1].expand(-1, S, -1))
    probs_QE = (x_TH.view(Q, S * H) @ router.gate_EX.T).softmax(-1)
    kept = torch.zeros_like(probs_QE).scatter(1, probs_QE.topk(3).indices, 1.0)
    torch.testing.assert_close(gate_QSE[:, 0], probs_QE * kept)
    gate_QSE.square().sum().backward()
    assert router.gate_EX.grad.abs().max() > 0
    released = ExpertSelection(router.gate_EX, 3, weighted=False)(x_TH, SEQUENCES)
    assert torch.equal(released.to_dense().view(Q, S, E)[:, 0], kept)
    assert not released.weight_N.requires_grad


def test_all_slices_for_every_sequence_are_the_mlp():
    weights, x_TH = mlp(), seeded(T, H, seed=1)
    routing = ExpertSelection(seeded(E, S * H), E, weighted=False)(x_TH, SEQUENCES)
    wanted_TH = dense_forward(weights, x_TH)
    assert (forward(sliced(weights, E), x_TH, routing) - wanted_TH).norm() <= 1e-6 * wanted_TH.norm()


def test_sequences_that_the_gate_cannot_read_are_refused():
    router = ExpertSelection(seeded(E, S * H), 3)
    with pytest.raises(ValueError, match="sequences of 10 tokens, not 30"):
        router(seeded(T, H), Context())
    with pytest.raises(ValueError, match="one length"):
        router(seeded(T, H), Context(segment_T=(torch.arange(T) > 3).long()))
    with pytest.raises(ValueError, match="k=9"):
        ExpertSelection(seeded(E, S * H), 9)


# --- MoHD ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gated", [True, False])
def test_all_groups_with_equal_scores_are_the_mlp_bit_for_bit(gated):
    """R17 (MoHD): difference 0."""
    weights, x_TH = mlp(gated), seeded(T, H, seed=1)
    routing = HiddenGroups(torch.zeros(E, H), k=2, shared=6)(x_TH, Context())
    assert (routing.weight_N == 1).all()
    assert torch.equal(mohd_masked(x_TH, weights, routing), dense_forward(weights, x_TH))


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", ["gelu", "silu", "relu"])
def test_active_groups_alone_are_the_masked_mlp(gated, activation):
    weights, x_TH = mlp(gated, activation=activation), seeded(T, H, seed=1)
    routing = HiddenGroups(seeded(E, H, seed=6), k=2, shared=3)(x_TH, Context())
    y_TH = mohd_forward(x_TH, sliced(weights, E), routing)
    torch.testing.assert_close(y_TH, mohd_masked(x_TH, weights, routing), rtol=1e-4, atol=1e-4)


def test_shared_groups_are_always_on_and_weights_are_scaled():
    router, x_TH = HiddenGroups(seeded(E, H, seed=6), k=2, shared=3), seeded(T, H, seed=1)
    routing = router(x_TH, Context())
    gate_TE = routing.to_dense()
    assert (routing.k_T == 5).all()
    assert (gate_TE[:, :3] > 0).all()
    active_TE = routing.probs_TE * (gate_TE > 0)
    torch.testing.assert_close(gate_TE, active_TE * E * active_TE.sum(1, keepdim=True))
    assert len(routing.token_N) / (T * E) == 5 / 8, "FLOPs fall to the active share"


def test_the_gate_acts_before_the_activation():
    """Weighting what a slice puts out is another function, unless the MLP is gated and ``up`` enters linearly."""
    x_TH = seeded(T, H, seed=1)
    routing = HiddenGroups(seeded(E, H, seed=6), k=2, shared=3)(x_TH, Context())
    for gated in (True, False):
        parts = sliced(mlp(gated), E)
        same = torch.allclose(mohd_forward(x_TH, parts, routing), forward(parts, x_TH, routing), rtol=1e-3, atol=1e-3)
        assert same == gated


def test_fusion_of_identities_is_no_fusion():
    parts, x_TH = sliced(mlp(gated=False), E), seeded(T, H, seed=1)
    routing = HiddenGroups(seeded(E, H, seed=6), k=2, shared=3)(x_TH, Context())
    eye_ECC = torch.eye(F // E).expand(E, -1, -1)
    torch.testing.assert_close(mohd_forward(x_TH, parts, routing, eye_ECC), mohd_forward(x_TH, parts, routing))
    mixed = mohd_forward(x_TH, parts, routing, seeded(E, F // E, F // E))
    assert not torch.allclose(mixed, mohd_forward(x_TH, parts, routing))


def test_groups_that_are_off_are_never_read():
    parts, x_TH = sliced(mlp(), E), seeded(T, H, seed=1)
    routing = HiddenGroups(torch.zeros(E, H), k=0, shared=5)(x_TH, Context())
    down = parts.down.clone()
    down[5:] = float("nan")
    torch.testing.assert_close(
        mohd_forward(x_TH, replace(parts, down=down), routing), mohd_forward(x_TH, parts, routing)
    )


def test_mohd_padding_gradients_and_bounds():
    router, x_TH = HiddenGroups(seeded(E, H, seed=6), k=2, shared=3), seeded(T, H, seed=1)
    valid_T = torch.arange(T) % 3 != 0
    routing = router(x_TH, Context(valid_T=valid_T))
    assert not routing.k_T[~valid_T].any()
    mohd_forward(x_TH, sliced(mlp(), E), routing).square().sum().backward()
    assert router.scorer.weight_EH.grad.abs().max() > 0
    for k, shared in ((0, 0), (6, 3), (-1, 3)):
        with pytest.raises(ValueError, match="must name between 1 and 8 groups"):
            HiddenGroups(seeded(E, H), k, shared)
