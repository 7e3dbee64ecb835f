"""DCMoE: top-p with a null expert beside experts that are always on, under one softmax."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moebench.contracts import Selection, load_attribute
from moebench.moe.layer import LayerWeights
from moebench.moe.router_params import nucleus as top_p
from moebench.moe.router_params.dcmoe import DESCRIPTORS, DCMoE
from moebench.moe.routers.dcmoe import mixer_weights
from moebench.moe.routing import Context
from moebench.moe.shapes import ModelShape

VARIANTS = [
    ("dcmoe", DCMoE(), {}),
    ("dcmoe", DCMoE(released_weights=True), {}),
    ("dcmoe", DCMoE(p=0.4, null=3, fixed=1), {}),
    ("dcmoe", DCMoE(null=0, fixed=0), {}),
]
HIDDEN, EXPERTS, TOKENS = 32, 8, 48
SHAPE = ModelShape(HIDDEN, 8, EXPERTS, 2, (0, 1), Selection("softmax", 2, True))
every_variant = pytest.mark.parametrize("params", [variant[1] for variant in VARIANTS])


def seeded(*size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def build(params, seed=0, descriptor=DESCRIPTORS[0]):
    weights = LayerWeights(torch.zeros(1), torch.zeros(1))
    return load_attribute(descriptor.factory)(params)(weights, SHAPE, seed)


def test_the_defaults_are_those_of_the_released_runs():
    """Four dynamic experts, one null and two fixed ones, p = 0.7."""
    params = DCMoE()
    assert (params.p, params.null, params.fixed) == (0.7, 1, 2)
    assert params.kinds(SHAPE.with_(experts=6)) == ("ffn",) * 6 + ("zero",)
    assert params.max_k(SHAPE.with_(experts=6)) == 2 + 4


@settings(deadline=None, max_examples=60)
@given(p=st.floats(0.05, 1.0), null=st.integers(0, 3), fixed=st.integers(0, 3), seed=st.integers(0, 99))
def test_choice_and_weights_by_hand(p, null, fixed, seed):
    """Experts from the best on until they hold p; then exp(z) over the sum of what was taken, fixed ones included."""
    params = DCMoE(p=p, null=null, fixed=fixed)
    routing = build(params, seed).router(3 * seeded(6, HIDDEN, seed=seed), Context())
    dynamic = EXPERTS - fixed
    for token, logits in enumerate(routing.logits_TE.tolist()):
        power = torch.tensor(logits, dtype=torch.float64).exp().tolist()
        compete = [*range(dynamic), *range(EXPERTS, EXPERTS + null)]
        total, held, taken = sum(power[e] for e in compete), 0.0, [*range(dynamic, EXPERTS)]
        for expert in sorted(compete, key=lambda e: -power[e]):
            if held >= p - 1e-6:
                break
            taken.append(expert)
            held += power[expert] / total
        last = power[taken[-1]] / total if len(taken) > fixed else 1.0
        if min(abs(held - p), abs(held - last - p)) < 1e-5:
            continue  # rounding decides whether one more is taken
        mine = routing.to_dense()[token].tolist()
        everything = sum(power[e] for e in taken)
        expected = [power[e] / everything if e in taken and e < EXPERTS else 0.0 for e in range(EXPERTS + null)]
        assert mine == pytest.approx(expected, abs=2e-6)


def test_renormalising_first_comes_to_the_same():
    """The released order: softmax among the dynamic ones, times their part of the softmax over all that is taken."""
    routing = build(DCMoE()).router(seeded(TOKENS, HIDDEN), Context())
    fixed_E = torch.tensor([False] * 6 + [True] * 2 + [False])
    power_TE = routing.logits_TE.exp()
    taken_TE = (routing.to_dense() > 0) | (lost_to_nulls(routing) & ~fixed_E)
    dynamic_TE = power_TE * (taken_TE & ~fixed_E)
    part_T1 = dynamic_TE.sum(1, keepdim=True) / (power_TE * taken_TE).sum(1, keepdim=True)
    expected_TE = dynamic_TE / dynamic_TE.sum(1, keepdim=True) * part_T1
    torch.testing.assert_close(routing.to_dense()[:, :6], expected_TE[:, :6])


def lost_to_nulls(routing):
    """Whether the null expert, the last id, was taken: the weights of the others do not sum to one."""
    taken_TE = torch.zeros(routing.shape, dtype=torch.bool)
    taken_TE[:, -1] = routing.to_dense().sum(1) < 1 - 1e-4
    return taken_TE


def test_a_null_expert_takes_its_weight_with_it():
    routing = build(DCMoE()).router(seeded(TOKENS, HIDDEN), Context())
    sum_T = routing.to_dense().sum(1)
    lost_T = lost_to_nulls(routing)[:, -1]
    assert 0 < int(lost_T.sum()) < TOKENS
    torch.testing.assert_close(sum_T[~lost_T], torch.ones(int((~lost_T).sum())))
    assert not (routing.expert_N == EXPERTS).any()


@every_variant
def test_fixed_experts_are_always_on_and_k_has_its_bounds(params):
    routing = build(params).router(seeded(TOKENS, HIDDEN), Context())
    fixed = slice(EXPERTS - params.fixed, EXPERTS)
    assert bool((routing.to_dense()[:, fixed] > 0).all())
    assert params.fixed <= int(routing.k_T.min()) <= int(routing.k_T.max()) <= params.max_k(SHAPE)
    assert not routing.probs_TE[:, fixed].any()
    torch.testing.assert_close(routing.probs_TE.sum(1), torch.ones(TOKENS))


def test_without_null_and_fixed_experts_it_is_top_p():
    x_TH = seeded(TOKENS, HIDDEN)
    ours = build(DCMoE(null=0, fixed=0)).router(x_TH, Context())
    theirs = build(top_p.TopP(p=0.7), descriptor=top_p.DESCRIPTORS[0]).router(x_TH, Context())
    assert torch.equal(ours.expert_N, theirs.expert_N)
    torch.testing.assert_close(ours.to_dense(), theirs.to_dense())


# --- the released weights --------------------------------------------------------------------------------------------


def test_the_released_weights_of_dynamic_experts_are_much_the_same():
    """The same experts and the same sum, but 1 : 1 : 1 where no two scores lie within 2 % of each other."""
    x_TH, params = seeded(400, HIDDEN), DCMoE(null=0)
    ours, released = (build(DCMoE(null=0, released_weights=flag)).router(x_TH, Context()) for flag in (False, True))
    assert torch.equal(ours.expert_N, released.expert_N)
    dynamic = EXPERTS - params.fixed
    ours_TE, released_TE = (routing.to_dense()[:, :dynamic] for routing in (ours, released))
    torch.testing.assert_close(ours_TE.sum(1), released_TE.sum(1))
    torch.testing.assert_close(ours.to_dense()[:, dynamic:], released.to_dense()[:, dynamic:])

    def evenness(gate_TE):
        least_T = gate_TE.masked_fill(gate_TE == 0, 1.0).amin(1)
        return least_T / gate_TE.amax(1)

    several_T = (ours_TE > 0).sum(1) > 1
    assert float((evenness(released_TE)[several_T] > 0.999).double().mean()) > 0.7
    assert float((evenness(ours_TE)[several_T] > 0.999).double().mean()) < 0.05


def test_a_mixer_shares_with_what_is_near():
    """2 and 1.99 are within 2 %: the first has softmax over both, the second is alone after it."""
    scores_TE = torch.tensor([[2.0, 0.5, 1.99, -3.0], [0.0, 0.0, -1.0, -2.0]], dtype=torch.float64)
    drawn_TE = torch.tensor([[True, False, True, False], [True, False, False, False]])
    first = float(torch.tensor([2.0, 1.99], dtype=torch.float64).softmax(0)[0])
    weight_TE = mixer_weights(scores_TE, drawn_TE)
    assert weight_TE[0].tolist() == pytest.approx([first / (1 + first), 0.0, 1 / (1 + first), 0.0])
    assert weight_TE[1].tolist() == [1.0, 0.0, 0.0, 0.0]


# --- what every router promises --------------------------------------------------------------------------------------


@every_variant
def test_invalid_tokens_have_no_entries(params):
    valid_T, x_TH, router = torch.arange(TOKENS) % 3 != 0, seeded(TOKENS, HIDDEN), build(params).router
    routing = router(x_TH, Context(valid_T=valid_T))
    assert not routing.k_T[~valid_T].any()
    assert torch.equal(routing.to_dense()[valid_T], router(x_TH, Context()).to_dense()[valid_T])
    assert router(x_TH[:0], Context()).shape == (0, EXPERTS + params.null)


@every_variant
def test_the_output_teaches_every_row_of_the_router(params):
    bundle = build(params)
    gate_TE = bundle.router(seeded(400, HIDDEN), Context()).to_dense()
    (gate_TE * seeded(*gate_TE.shape, seed=3)).sum().backward()
    gradient_EH = bundle.router.scorer.weight_EH.grad
    assert torch.isfinite(gradient_EH).all()
    assert float(gradient_EH.abs().amax(1).min()) > 1e-5


@pytest.mark.parametrize(
    ("changes", "reason"), [({"p": 0.0}, "lie in"), ({"null": -1}, "null"), ({"fixed": -1}, "fixed")]
)
def test_impossible_parameters_are_refused(changes, reason):
    with pytest.raises(ValueError, match=reason):
        DCMoE(**changes)


def test_some_experts_must_be_left_to_choose_from():
    with pytest.raises(ValueError, match="leave some of the layer's 8"):
        DCMoE(fixed=8).kinds(SHAPE)
