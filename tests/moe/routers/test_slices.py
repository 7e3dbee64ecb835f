"""Union of Experts and MoHD as routings over slices of an MLP: plain FFN experts, which any backend runs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moebench.contracts import Selection, load_attribute
from moebench.moe.experts import ExpertStore
from moebench.moe.layer import LayerWeights, PreparedLayer, ffn_hidden, moe_forward
from moebench.moe.plugins import Split
from moebench.moe.router_params.slices import DESCRIPTORS, MoHD, UnionOfExperts
from moebench.moe.routing import Context
from moebench.moe.shapes import ModelShape
from moebench.moe.slices import mohd_forward, sliced
from moebench.moe.structure import split

H, F, E, S, Q = 12, 32, 8, 16, 3
TOKENS = Q * S
SEGMENT_T = torch.arange(Q).repeat_interleave(S)
SEQUENCES = Context(segment_T=SEGMENT_T)
VARIANTS = [
    ("uoe", UnionOfExperts(), {}),
    ("uoe", UnionOfExperts(k=2, keep=0.25, weighted=False), {}),
    ("uoe", UnionOfExperts(batch_norm_epsilon=1e-6, capacity=1.0), {}),
    ("uoe", UnionOfExperts(select="expert", k=2, sequence=S), {}),
    ("uoe", UnionOfExperts(select="expert", weighted=False, sequence=S), {}),
    ("mohd", MoHD(), {}),
    ("mohd", MoHD(k=3, shared=0), {}),
    ("mohd", MoHD(k=0, shared=2), {"gated": False, "activation": "relu"}),
]
FACTORIES = {descriptor.name: descriptor.factory for descriptor in DESCRIPTORS}
every_variant = pytest.mark.parametrize(("name", "params", "changes"), VARIANTS)


def seeded(*size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def shape_of(**changes):
    return ModelShape(H, F // E, E, 2, (0, 1), Selection("softmax", 2, True)).with_(**changes)


def build(name, params, changes=None, router_EH=None, seed=0):
    weights = LayerWeights(torch.zeros(1), torch.zeros(1), router_EH)
    return load_attribute(FACTORIES[name])(params)(weights, shape_of(**(changes or {})), seed)


def mlp(gated=True, activation="gelu", seed=0):
    rows = 2 * F if gated else F
    gate_up, down = seeded(rows, H, seed=seed).double(), seeded(H, F, seed=seed + 1).double()
    return LayerWeights(gate_up, down, activation=activation, gated=gated)


def forward(parts, x_TH, bundle, ctx=SEQUENCES):
    store = ExpertStore(parts.gate_up, parts.down, bundle.kinds, parts.activation, parts.gated)
    return moe_forward(PreparedLayer(store, bundle.router), x_TH, ctx)


# --- Union of Experts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("select", ["data", "expert"])
def test_everything_kept_at_weight_one_is_the_mlp(select):
    """R17: 2.7e-7 in float32; float64 here."""
    weights, x_TH = mlp(activation="silu"), seeded(TOKENS, H, seed=1).double()
    wanted_TH = ffn_hidden(x_TH, weights.gate_up, "silu") @ weights.down.T
    bundle = build("uoe", UnionOfExperts(select=select, k=E, keep=1.0, weighted=False, sequence=S))
    slices = split(Split(E, 0, 2, "contiguous"))(weights, x_TH.float(), 0)
    for parts in (sliced(weights, E), slices):
        torch.testing.assert_close(forward(parts, x_TH, bundle), wanted_TH, rtol=1e-10, atol=1e-10)


def test_by_default_a_slice_takes_half_of_each_sequence_and_a_token_half_of_the_slices():
    bundle = build("uoe", UnionOfExperts())
    routing = bundle.router(seeded(TOKENS, H, seed=1), SEQUENCES)
    assert bundle.router.k == E // 2
    for segment in range(Q):
        mine_N = SEGMENT_T[routing.token_N] == segment
        assert routing.expert_N[mine_N].bincount(minlength=E).max() <= S // 2
    assert routing.k_T.max() <= E // 2
    assert torch.equal(routing.weight_N, routing.probs_TE[routing.token_N, routing.expert_N])


def test_released_sum_takes_tokens_of_gate_zero_and_teaches_nothing():
    """The paper's definition is the default: weighted, and no token where its gate is zero."""
    x_TH = seeded(TOKENS, H, seed=1)
    ours, released = (build("uoe", UnionOfExperts(k=1, keep=0.5, weighted=weighted)) for weighted in (True, False))
    routing = released.router(x_TH, SEQUENCES)
    assert ours.router(x_TH, SEQUENCES).weight_N.requires_grad
    assert not routing.weight_N.requires_grad
    assert (routing.weight_N == 1).all()
    assert (routing.counts_E == TOKENS // 2).all()
    assert ours.router(x_TH, SEQUENCES).k_T.max() == 1 < routing.k_T.max() <= E


def test_released_division_by_the_batch_makes_a_lone_sequences_gates_equal():
    x_TH = seeded(S, H, seed=1)
    ours, released = (
        build("uoe", UnionOfExperts(k=2, keep=1.0, batch_norm_epsilon=epsilon)).router(x_TH, Context()).weight_N
        for epsilon in (None, 1e-9)
    )
    torch.testing.assert_close(released, torch.ones(2 * S))
    assert ours.std() > 0.01


def test_a_sequence_shares_its_slices_and_no_other_length_is_taken():
    bundle = build("uoe", UnionOfExperts(select="expert", k=2, sequence=S))
    x_TH = seeded(TOKENS, H, seed=1)
    gate_TE = bundle.router(x_TH, SEQUENCES).to_dense()
    for segment in range(Q):
        rows = gate_TE[segment == SEGMENT_T]
        assert (rows == rows[0]).all()
        assert (rows[0] > 0).sum() == 2
    with pytest.raises(ValueError, match="reads sequences of 16 tokens, not 48"):
        bundle.router(x_TH, Context())


@pytest.mark.parametrize("params", [variant[1] for variant in VARIANTS if variant[0] == "uoe"])
def test_padding_fills_a_sequence_up_and_takes_no_place(params):
    """Whatever the padding holds: rows of it are read as zeros, and slices share the tokens that are left."""
    router, x_TH = build("uoe", params).router, seeded(TOKENS, H, seed=1)
    valid_T = torch.arange(TOKENS) % S < torch.tensor([S, 10, 6]).repeat_interleave(S)
    ctx = Context(segment_T=SEGMENT_T, valid_T=valid_T)
    gate_TE = router(x_TH, ctx).to_dense()
    assert not gate_TE[~valid_T].any()
    assert torch.equal(router(x_TH.masked_fill(~valid_T[:, None], float("nan")), ctx).to_dense(), gate_TE)
    if params.select == "data":
        most = (valid_T.view(Q, S).sum(1) * params.keep).int()
        assert ((gate_TE.view(Q, S, E) > 0).sum(1) <= most[:, None]).all()
    else:
        assert (gate_TE[valid_T] > 0).any(1).all()
    for tokens in (torch.zeros(0, H), torch.zeros(0, H).bfloat16()):
        assert router(tokens, Context(segment_T=torch.zeros(0, dtype=torch.int64))).shape == (0, E)
        assert router(tokens, Context()).shape == (0, E)


# --- MoHD ------------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=20)
@given(
    st.sampled_from([(True, "silu"), (True, "gelu"), (True, "relu"), (False, "relu")]),
    st.integers(0, 4),
    st.integers(0, 4),
    st.integers(0, 99),
)
def test_ffn_experts_are_mohd(mlp_kind, shared, k, seed):
    """A weight before the activation is one on the output: ``up`` is linear, and relu passes what is positive."""
    k = max(k, 1 - shared)
    gated, activation = mlp_kind
    weights, x_TH = mlp(gated, activation, seed), seeded(TOKENS, H, seed=seed + 2).double()
    bundle = build("mohd", MoHD(k, shared), {"gated": gated, "activation": activation}, seed=seed)
    parts = sliced(weights, E)
    wanted_TH = mohd_forward(x_TH, parts, bundle.router(x_TH, Context()))
    # the weights of the routing are float32, and multiply at two places
    torch.testing.assert_close(forward(parts, x_TH, bundle), wanted_TH, rtol=1e-9, atol=1e-9)


def test_all_groups_with_even_scores_are_the_mlp():
    """R17: difference 0 in the weights, which are all 1."""
    weights, x_TH = mlp(), seeded(TOKENS, H, seed=1).double()
    bundle = build("mohd", MoHD(k=2, shared=6), router_EH=torch.zeros(E, H))
    assert (bundle.router(x_TH, Context()).weight_N == 1).all()
    wanted_TH = ffn_hidden(x_TH, weights.gate_up, "gelu") @ weights.down.T
    torch.testing.assert_close(forward(sliced(weights, E), x_TH, bundle), wanted_TH, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("experts", "active"), [(16, (6, 2)), (8, (3, 1)), (4, (1, 1)), (2, (0, 1)), (1, (0, 1))])
def test_by_default_half_is_active_and_three_quarters_of_that_shared(experts, active):
    assert MoHD().active(shape_of(experts=experts)) == active
    assert MoHD().max_k(shape_of(experts=experts)) == sum(active)


def test_shared_groups_are_on_for_every_token():
    routing = build("mohd", MoHD(k=1, shared=3)).router(seeded(TOKENS, H), Context())
    assert (routing.k_T == 4).all()
    assert (routing.counts_E[:3] == TOKENS).all()
    assert int(routing.counts_E[3:].sum()) == TOKENS


@pytest.mark.parametrize("activation", ["gelu", "silu"])
def test_what_no_weight_on_the_output_can_be_is_refused(activation):
    """The same weights before and after an activation without a gate give different functions."""
    with pytest.raises(ValueError, match=f"a weight before {activation} is none on the output"):
        MoHD().kinds(shape_of(gated=False, activation=activation))
    weights, x_TH = mlp(False, activation), seeded(TOKENS, H, seed=1).double()
    bundle, parts = build("mohd", MoHD()), sliced(weights, E)
    wanted_TH = mohd_forward(x_TH, parts, bundle.router(x_TH, Context()))
    assert not torch.allclose(forward(parts, x_TH, bundle), wanted_TH, rtol=0.05, atol=0.05)


# --- both ------------------------------------------------------------------------------------------------------------


@every_variant
def test_entries_keep_what_the_parameters_promise(name, params, changes):
    bundle = build(name, params, changes)
    routing = bundle.router(seeded(TOKENS, H, seed=1), SEQUENCES)
    assert bundle.kinds == ("ffn",) * E == params.kinds(shape_of(**changes))
    assert params.selection(shape_of(**changes)) is None
    assert routing.k_T.max() <= params.max_k(shape_of(**changes))
    assert len(routing.token_N) > 0
    assert (routing.weight_N > 0).all()


@every_variant
def test_who_looks_ahead_says_so(name, params, changes):
    router, x_TH = build(name, params, changes).router, seeded(TOKENS, H, seed=1)
    before_TE = router(x_TH, SEQUENCES).to_dense()
    changed_TH = x_TH.clone()
    changed_TH[S // 2 : S] = seeded(S // 2, H, seed=2)
    after_TE = router(changed_TH, SEQUENCES).to_dense()
    same = torch.allclose(after_TE[: S // 2], before_TE[: S // 2], atol=1e-6)
    assert same == router.causal
    if "segment_T" in router.needs and getattr(params, "batch_norm_epsilon", None) is None:
        assert torch.allclose(after_TE[S:], before_TE[S:], atol=1e-6), "another sequence has no say"


@every_variant
def test_same_seed_same_routing(name, params, changes):
    x_TH = seeded(TOKENS, H, seed=1)
    first, again, other = (build(name, params, changes, seed=seed).router(x_TH, SEQUENCES) for seed in (3, 3, 4))
    assert torch.equal(first.to_dense(), again.to_dense())
    assert params == MoHD(k=0, shared=2) or not torch.equal(first.to_dense() != 0, other.to_dense() != 0)


def test_the_layers_own_router_is_the_gate():
    router_EH = seeded(E, H, seed=6)
    for name, params in (("uoe", UnionOfExperts()), ("mohd", MoHD())):
        assert torch.equal(build(name, params, router_EH=router_EH).router.scorer.weight_EH, router_EH)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: UnionOfExperts(keep=0.0), "keep=0.0"),
        (lambda: UnionOfExperts(sequence=0), "sequence=0"),
        (lambda: UnionOfExperts(batch_norm_epsilon=-1.0), "must not be negative"),
        (lambda: UnionOfExperts(select="expert", batch_norm_epsilon=1.0), 'belongs to select="data"'),
        (lambda: UnionOfExperts(k=9).max_k(shape_of()), "k=9 must lie between 1 and the layer's 8 slices"),
        (lambda: MoHD(k=6, shared=3).max_k(shape_of()), "must name between 1 and 8 groups"),
        (lambda: MoHD(k=0, shared=0).max_k(shape_of()), "must name between 1 and 8 groups"),
    ],
)
def test_impossible_parameters_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
