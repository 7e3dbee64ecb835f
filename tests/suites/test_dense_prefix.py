"""The first tokens of a window have nothing left out, the others do, and the oracle knows both."""

from dataclasses import replace

import pytest
import torch

from moebench.contracts import LayerSpec, Registry, SparsitySpec
from moebench.moe.channels import SiteRule, Sparsity
from moebench.moe.experts import ExpertStore
from moebench.moe.layer import PreparedLayer, routed_sum
from moebench.moe.routing import Routing
from moebench.suites.quality.block import Call, MoEBlock
from moebench.suites.subject import Subject
from moebench.suites.tasks.block import Rows, TaskBlock

E, H, F, T = 3, 16, 12, 40


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_block(prefix, with_whole=True):
    store = ExpertStore(randn(E, 2 * F, H, seed=1), randn(E, H, F, seed=2), ("ffn",) * E)
    spec = LayerSpec(H, F, store.kinds, schemes=store.schemes, max_k=2)
    sparse_spec = replace(spec, sparsity=SparsitySpec(("input",), dense_prefix=prefix))
    sparse = replace(store, sparsity=Sparsity({"input": SiteRule(0.7)}))
    eager = Registry.load().get("backend", "eager").create({})
    run = eager.load({0: sparse}, {0: sparse_spec}).layer(0)
    whole = eager.load({0: store}, {0: spec}).layer(0) if with_whole else None
    subject = Subject(None, None, PreparedLayer(sparse, None), sparse_spec)
    return MoEBlock(0, subject, run, [], 0, torch.nn.Identity(), whole), store, sparse


def make_call(block, x_TH, routing):
    return Call(block, x_TH, routing, block.computed(x_TH, routing), torch.empty(0), routing, block.prefix(len(x_TH)))


@pytest.mark.parametrize(("prefix", "rows"), [(0.0, 0), (0.01, 1), (0.05, 2), (0.26, 11), (1.0, T)])
def test_nothing_is_left_out_of_the_first_tokens(prefix, rows):
    block, store, sparse = make_block(prefix)
    weights, indices = randn(T, E, seed=3).softmax(-1).topk(2)
    x_TH, routing = randn(T, H), Routing.topk(indices, weights, E)
    call = make_call(block, x_TH, routing)
    assert block.prefix(T) == rows
    assert torch.allclose(call.y_TH[:rows], routed_sum(store, x_TH, routing)[:rows], atol=1e-5)
    assert torch.allclose(call.y_TH[rows:], routed_sum(sparse, x_TH, routing)[rows:], atol=1e-5)
    assert call.check().ok
    tokens = T - rows
    density = {metric.name: metric for metric in call.sparsity()}["density_input"]
    assert density.n == 2 * tokens * H
    if tokens:
        assert density.value == pytest.approx((x_TH[rows:].abs() > 0.7).float().mean().item(), abs=0.05)


def test_a_prefix_that_is_left_out_after_all_is_wrong():
    block, _, sparse = make_block(0.05)
    weights, indices = randn(T, E, seed=3).softmax(-1).topk(2)
    x_TH, routing = randn(T, H), Routing.topk(indices, weights, E)
    everywhere = replace(make_call(block, x_TH, routing), y_TH=routed_sum(sparse, x_TH, routing))
    assert not everywhere.check().ok
    assert make_call(make_block(0.05, with_whole=False)[0], x_TH, routing).check().ok


def test_a_part_of_a_routing_is_that_of_its_tokens():
    weights, indices = randn(T, E, seed=3).softmax(-1).topk(2)
    routing = Routing.topk(indices, weights, E, logits_TE=randn(T, E))
    part = routing.part(5, 12)
    assert part.shape == (7, E)
    assert torch.equal(part.to_dense(), routing.to_dense()[5:12])
    assert torch.equal(part.logits_TE, routing.logits_TE[5:12])
    assert routing.part(T, T + 3).num_tokens == 0


@pytest.mark.parametrize(("kept", "rows"), [(None, 1), (0, 1), (7, 0)])
def test_tokens_that_follow_others_are_no_first_tokens(kept, rows):
    class Cache:
        def get_seq_length(self):
            return kept

    block, _, _ = make_block(0.01)
    task = TaskBlock(0, block.subject, block.executor, [], 0, torch.nn.Identity(), block.whole)
    task.rows = Rows()
    task.rows.begin(
        None, (torch.zeros(1, 1, dtype=torch.long),), {"past_key_values": None if kept is None else Cache()}
    )
    assert task.prefix(1) == rows
