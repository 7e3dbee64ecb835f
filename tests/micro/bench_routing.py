"""The cost of deciding: top-k selection, and the permutation by expert."""

import itertools

import pytest
import torch

from moebench.contracts import Selection
from moebench.moe.router import Linear, Pipeline, TopK, select, weighter
from moebench.moe.routing import Context, Routing


@pytest.mark.parametrize("tokens", [1, 256])
@pytest.mark.parametrize("score", ["softmax", "sigmoid", "one"])
def test_select(benchmark, layer, score, tokens):
    logits_TE = layer.logits(tokens)
    indices_TK, weights_TK = benchmark(select, logits_TE, Selection(score, 2, renormalize=True))
    assert torch.equal(indices_TK, logits_TE.argsort(dim=-1, descending=True)[:, :2])
    assert torch.allclose(weights_TK.sum(-1), torch.ones(tokens))


def test_select_in_groups(benchmark, layer):
    logits_TE = layer.logits(256)
    selection = Selection("sigmoid", 2, renormalize=False, groups=(4, 2))
    indices_TK, _ = benchmark(select, logits_TE, selection)
    worth_TG = logits_TE.sigmoid().reshape(256, 4, 4).sort(descending=True).values[:, :, :2].sum(-1)
    kept_T2 = worth_TG.argsort(dim=-1, descending=True)[:, :2]
    assert ((indices_TK // 4)[:, :, None] == kept_T2[:, None, :]).any(-1).all()


@pytest.mark.parametrize("tokens", [1, 256])
def test_router(benchmark, layer, tokens):
    x_TH, weight_EH = layer.normal(tokens, layer.hidden), layer.normal(layer.experts, layer.hidden, seed=3)
    router = Pipeline(Linear(weight_EH), TopK(2), weighter(layer.selection)).requires_grad_(False)
    gate_TE = benchmark(lambda: router(x_TH, Context()).to_dense())
    best_TK = (x_TH.double() @ weight_EH.double().T).softmax(-1).topk(2)
    expected_TK = best_TK.values / best_TK.values.sum(-1, keepdim=True)
    assert torch.allclose(gate_TE.gather(1, best_TK.indices).double(), expected_TK, atol=1e-5)
    assert torch.equal(gate_TE.count_nonzero(dim=1), torch.full((tokens,), 2))


@pytest.mark.parametrize("tokens", [1, 256, 4096])
def test_sorted(benchmark, layer, tokens):
    routing = layer.routing(tokens)

    def permuted():
        fresh = Routing(routing.token_N, routing.expert_N, routing.weight_N, routing.shape)  # counts are remembered
        return fresh.sorted()

    token_N, offsets_E1, weight_N = benchmark(permuted)
    dense_TE = routing.to_dense()
    for expert, (start, end) in enumerate(itertools.pairwise(offsets_E1)):
        assert torch.equal(token_N[start:end], dense_TE[:, expert].nonzero().flatten())
        assert torch.equal(weight_N[start:end], dense_TE[token_N[start:end], expert])
