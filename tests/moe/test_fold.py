"""Folding: a layer of every kind of expert equals its FFN experts with the others added back."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moebench.backends.eager import Eager
from moebench.backends.reference import Reference
from moebench.contracts import LayerSpec, MoebenchError
from moebench.moe.experts import Constants, ExpertStore
from moebench.moe.fold import Fold, Folded, fold_kinds, fold_store
from moebench.moe.oracle import compare, reference
from moebench.moe.routing import Routing

H, F = 8, 4
kinds_lists = st.lists(st.sampled_from(["ffn", "zero", "copy", "constant"]), min_size=1, max_size=7).filter(
    lambda kinds: "ffn" in kinds
)


def layer(kinds, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    owners, constants = kinds.count("ffn"), kinds.count("constant")
    return ExpertStore(
        torch.randn(owners, 2 * F, H, generator=generator).to(dtype),
        torch.randn(owners, H, F, generator=generator).to(dtype),
        tuple(kinds),
        constants=Constants(torch.randn(constants, 2, H, generator=generator), torch.randn(constants, H)),
    )


def traffic(tokens, experts, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    gate_TE = torch.randn(tokens, experts, generator=generator)
    keep_TE = torch.rand(tokens, experts, generator=generator) > 0.4
    return torch.randn(tokens, H, generator=generator).to(dtype), Routing.dense(gate_TE * keep_TE)


def executor(store, boundary, dtype="float64", cls=Eager):
    spec = LayerSpec(H, F, store.kinds, dtype, boundary=boundary)
    return cls().load({0: store}, {0: spec}).layer(0)


def inputs(routing, boundary):
    return routing.sorted() if boundary == "sorted" else routing.padded()


@settings(deadline=None, max_examples=80)
@given(kinds_lists, st.sampled_from(["topk", "sorted"]), st.sampled_from([0, 1, 5]), st.integers(0, 999))
def test_folded_is_the_layer(kinds, boundary, tokens, seed):
    store = layer(kinds, seed)
    x_TH, routing = traffic(tokens, len(kinds), seed)
    folded = Folded(executor(fold_store(store), boundary), store)
    out_TH = torch.full_like(x_TH, float("nan"))
    assert folded(x_TH, *inputs(routing, boundary), out_TH=out_TH) is out_TH
    expected = reference(store, routing, x_TH)
    assert compare(out_TH, expected, torch.float64).ok
    torch.testing.assert_close(folded(x_TH, *inputs(routing, boundary)), out_TH, rtol=1e-14, atol=1e-14)
    native = executor(store, boundary, cls=Reference)(x_TH, *inputs(routing, boundary))
    assert compare(native, expected, torch.float64).ok


@pytest.mark.parametrize("boundary", ["topk", "sorted"])
def test_folded_in_bfloat16(boundary):
    store = layer(["ffn", "constant", "ffn", "copy", "zero"], 1, torch.bfloat16)
    x_TH, routing = traffic(33, 5, 2, torch.bfloat16)
    folded = Folded(executor(fold_store(store), boundary, "bfloat16"), store)
    verdict = compare(folded(x_TH, *inputs(routing, boundary)), reference(store, routing, x_TH), torch.bfloat16)
    assert verdict.ok, verdict


def test_folded_inputs_are_over_the_ffn_experts_alone():
    store = layer(["copy", "ffn", "zero", "ffn"], 0)
    indices_TK = torch.tensor([[1, 0], [3, 2], [4, 4]])
    weights_TK = torch.tensor([[0.5, -2.0], [1.5, 3.0], [0.0, 0.0]])
    x_TH = torch.randn(3, H, dtype=torch.float64)
    (folded_TK, kept_TK), added_TH = fold_kinds(store, (indices_TK, weights_TK), x_TH)
    assert folded_TK.tolist() == [[0, 2], [1, 2], [2, 2]]
    assert kept_TK.tolist() == [[0.5, 0.0], [1.5, 0.0], [0.0, 0.0]]
    assert torch.equal(added_TH, torch.tensor([-2.0, 0.0, 0.0], dtype=torch.float64)[:, None] * x_TH)
    assert torch.equal(indices_TK, torch.tensor([[1, 0], [3, 2], [4, 4]]))
    routing = Routing.topk(indices_TK, weights_TK, 4)
    (token_N, offsets_E1, weight_N), again_TH = fold_kinds(store, routing.sorted(), x_TH)
    assert (token_N.tolist(), offsets_E1.tolist(), weight_N.tolist()) == ([0, 1], [0, 1, 2], [0.5, 1.5])
    assert offsets_E1.dtype == torch.int32
    assert torch.equal(added_TH, again_TH)


@pytest.mark.parametrize("boundary", ["topk", "sorted"])
def test_gradients_pass_through_folding(boundary):
    kinds = ["ffn", "constant", "copy", "zero", "ffn"]
    store = layer(kinds, 3)
    x_TH, routing = traffic(6, 5, 4)
    grads = []
    for call in (Folded(executor(fold_store(store), boundary), store), executor(store, boundary, cls=Reference)):
        x = x_TH.clone().requires_grad_()
        *where, weights = inputs(routing, boundary)
        weights = weights.clone().requires_grad_()
        grads.append(torch.autograd.grad(call(x, *where, weights).square().sum(), [x, weights]))
    torch.testing.assert_close(grads[0][0], grads[1][0])
    mask = inputs(routing, boundary)[-1] != 0
    torch.testing.assert_close(grads[0][1][mask], grads[1][1][mask])


def test_what_cannot_be_folded_is_refused():
    store = layer(["ffn", "copy"], 0)
    with pytest.raises(MoebenchError, match="boundary topk or sorted"):
        fold_kinds(store, (torch.randn(3, 2),), torch.randn(3, H))
    with pytest.raises(MoebenchError, match="boundary topk or sorted"):
        fold_kinds(store, (torch.randn(3, 2), torch.randn(2)), torch.randn(3, H))
    with pytest.raises(MoebenchError, match="'gather' experts cannot be folded"):
        Fold(ExpertStore(store.gate_up, store.down, ("gather", "copy")))
    with pytest.raises(MoebenchError, match="has no constants"):
        Fold(ExpertStore(store.gate_up, store.down, ("ffn", "constant")))
