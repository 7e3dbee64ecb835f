"""The Routing algebra: every view holds the same sparse matrix."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moebench.moe.routing import Routing

relaxed = settings(deadline=None, max_examples=60)


@st.composite
def gates(draw: st.DrawFn) -> Tensor:
    """A sparse signed G_TE in which rows and columns may be empty; every weight is exact in float32."""
    tokens, experts = draw(st.integers(0, 7)), draw(st.integers(1, 6))
    weights = st.one_of(st.just(0.0), st.floats(-4, 4, width=16).filter(lambda w: w != 0))
    rows = draw(
        st.lists(st.lists(weights, min_size=experts, max_size=experts), min_size=tokens, max_size=tokens),
    )
    return torch.tensor(rows, dtype=torch.float32).reshape(tokens, experts)


def shuffled(routing: Routing, seed: int) -> Routing:
    """The same entries in another order."""
    order_N = torch.randperm(len(routing.token_N), generator=torch.Generator().manual_seed(seed))
    return Routing(routing.token_N[order_N], routing.expert_N[order_N], routing.weight_N[order_N], routing.shape)


@relaxed
@given(gates(), st.integers(0, 99))
def test_dense_round_trip(gate_TE, seed):
    assert torch.equal(shuffled(Routing.dense(gate_TE), seed).to_dense(), gate_TE)


@relaxed
@given(gates(), st.integers(0, 99), st.integers(0, 3))
def test_padded_and_topk_round_trip(gate_TE, seed, extra):
    routing = shuffled(Routing.dense(gate_TE), seed)
    busiest = max(int(routing.k_T.max()) if len(gate_TE) else 0, 1)
    indices_TK, weights_TK = routing.padded(busiest + extra)
    assert indices_TK.shape == weights_TK.shape == (len(gate_TE), busiest + extra)
    assert indices_TK.dtype == torch.int64
    assert weights_TK.dtype == torch.float32
    empty_TK = indices_TK == routing.num_experts
    assert torch.equal((~empty_TK).sum(1), routing.k_T)
    assert not weights_TK[empty_TK].any()
    assert torch.equal(Routing.topk(indices_TK, weights_TK, routing.num_experts).to_dense(), gate_TE)


@relaxed
@given(gates(), st.integers(0, 99))
def test_sorted_is_rows_by_expert_then_token(gate_TE, seed):
    token_N, offsets_E1, weight_N = shuffled(Routing.dense(gate_TE), seed).sorted()
    assert (token_N.dtype, offsets_E1.dtype, weight_N.dtype) == (torch.int64, torch.int32, torch.float32)
    assert int(offsets_E1[-1]) == len(token_N)
    for expert in range(gate_TE.shape[1]):
        start, end = offsets_E1[expert : expert + 2].tolist()
        assert torch.equal(token_N[start:end], gate_TE[:, expert].nonzero().flatten())
        assert torch.equal(weight_N[start:end], gate_TE[token_N[start:end], expert])


@relaxed
@given(gates(), st.integers(0, 3))
def test_by_expert_round_trip(gate_TE, extra):
    tokens, experts = gate_TE.shape
    indices_EC = torch.full((experts, tokens + extra), -1)
    weights_EC = torch.zeros(experts, tokens + extra)
    for expert in range(experts):
        taken = gate_TE[:, expert].nonzero().flatten()
        indices_EC[expert, : len(taken)] = taken
        weights_EC[expert, : len(taken)] = gate_TE[taken, expert]
    assert torch.equal(Routing.by_expert(indices_EC, weights_EC, tokens).to_dense(), gate_TE)


@relaxed
@given(gates())
def test_counts_are_those_of_the_matrix(gate_TE):
    routing = Routing.dense(gate_TE)
    assert torch.equal(routing.counts_E, (gate_TE != 0).sum(0))
    assert torch.equal(routing.k_T, (gate_TE != 0).sum(1))


@relaxed
@given(gates(), st.randoms(use_true_random=False))
def test_keep_and_concat_split_and_join(gate_TE, random):
    routing = Routing.dense(gate_TE)
    mask_N = torch.tensor([random.random() < 0.5 for _ in routing.token_N], dtype=torch.bool)
    joined = routing.keep(mask_N).concat(routing.keep(~mask_N))
    assert torch.equal(joined.to_dense(), gate_TE)


@relaxed
@given(gates(), st.integers(0, 99))
def test_relabel_moves_columns(gate_TE, seed):
    experts = gate_TE.shape[1]
    new_id_E = torch.randperm(experts + 2, generator=torch.Generator().manual_seed(seed))[:experts]
    moved_TE = Routing.dense(gate_TE).relabel(new_id_E, experts + 2).to_dense()
    assert torch.equal(moved_TE[:, new_id_E], gate_TE)
    assert torch.count_nonzero(moved_TE) == torch.count_nonzero(gate_TE)


@relaxed
@given(gates())
def test_scaled_by_a_number_and_by_entry(gate_TE):
    routing = Routing.dense(gate_TE)
    assert torch.equal(routing.scaled(2.0).to_dense(), gate_TE * 2)
    assert torch.equal(routing.scaled(routing.weight_N).to_dense(), gate_TE.square())


def test_topk_drops_slots_outside_the_experts():
    indices_TK = torch.tensor([[0, -1], [3, 2]])
    routing = Routing.topk(indices_TK, torch.ones(2, 2), 3)
    assert routing.k_T.tolist() == [1, 1]
    assert routing.expert_N.tolist() == [0, 2]


def test_padded_never_cuts():
    with pytest.raises(ValueError, match="ask for more slots"):
        Routing.dense(torch.ones(2, 3)).padded(2)


@pytest.mark.parametrize("view", ["dense", "padded", "scaled"])
def test_gradient_goes_through_views(view):
    weights_TK = torch.tensor([[0.25, 0.75], [0.5, 0.5]], requires_grad=True)
    routing = Routing.topk(torch.tensor([[0, 2], [1, 3]]), weights_TK, 3)
    views = {
        "dense": lambda: routing.to_dense(),
        "padded": lambda: routing.padded()[1],
        "scaled": lambda: routing.scaled(1.0).weight_N,
    }
    views[view]().sum().backward()
    assert weights_TK.grad.tolist() == [[1.0, 1.0], [1.0, 0.0]]
