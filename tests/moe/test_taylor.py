"""Structure ``taylor``: importance is the derivative that it says, and the channels stay a partition of the FFN."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moebench.contracts import Selection
from moebench.moe.experts import ExpertStore
from moebench.moe.layer import LayerWeights, PreparedLayer, SharedExpert, ffn_hidden, moe_forward
from moebench.moe.routing import Routing
from moebench.moe.shapes import ModelShape
from moebench.moe.transforms.params import TaylorSplit
from moebench.moe.transforms.taylor import taylor, taylor_importance

H, F = 12, 48


def seeded(*size, seed=0, dtype=torch.float32):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def dense(seed=0, dtype=torch.float32):
    return LayerWeights(seeded(2 * F, H, seed=seed, dtype=dtype), seeded(H, F, seed=seed + 100, dtype=dtype))


def output(weights, x_TH):
    return ffn_hidden(x_TH, weights.gate_up, "silu") @ weights.down.T


def all_experts(parts, x_TH):
    experts = len(parts.down)
    routing = Routing.dense(torch.ones(len(x_TH), experts))
    store = ExpertStore(parts.gate_up, parts.down, ("ffn",) * experts)
    return moe_forward(PreparedLayer(store, None, parts.shared), x_TH, routing=routing)


def test_importance_is_the_derivative_of_the_layers_error_times_the_activation():
    weights, x_TH = dense(dtype=torch.float64), seeded(7, H, seed=3, dtype=torch.float64)
    y_TH = output(weights, x_TH)
    total_F = torch.zeros(F, dtype=torch.float64)
    for x_H, y_H in zip(x_TH, y_TH, strict=True):
        a_F = ffn_hidden(x_H[None], weights.gate_up, "silu")[0]
        kept_F = torch.zeros(F, dtype=torch.float64, requires_grad=True)  # the layer left out
        loss = (y_H - weights.down @ kept_F).square().sum() / (2 * y_H.square().sum())
        (slope_F,) = torch.autograd.grad(loss, kept_F)
        total_F += (a_F * slope_F).abs()
    torch.testing.assert_close(taylor_importance(weights, x_TH), total_F / len(x_TH))


def test_importance_of_one_channel_that_makes_all_of_the_output_is_one():
    weights = dense()
    down = torch.zeros_like(weights.down)
    down[:, 5] = weights.down[:, 5]
    found_F = taylor_importance(replace(weights, down=down), seeded(9, H, seed=3))
    assert found_F[5] == pytest.approx(1, rel=1e-5)
    assert not found_F[torch.arange(F) != 5].any()


@settings(deadline=None, max_examples=20)
@given(st.sampled_from([(4, 1), (6, 2), (8, 3)]), st.sampled_from(["contiguous", "coactivation"]), st.integers(0, 5))
def test_all_experts_and_the_shared_one_are_the_dense_layer(cut, assignment, seed):
    experts, shared = cut
    weights, x_TH = dense(seed), seeded(40, H, seed=seed + 7)
    parts = taylor(TaylorSplit(experts, shared, 1, assignment))(weights, x_TH, seed)
    assert parts.down.shape == (experts - shared, H, F // experts)
    assert isinstance(parts.shared, SharedExpert)
    assert parts.shared.down.shape == (H, shared * F // experts)
    torch.testing.assert_close(all_experts(parts, x_TH), output(weights, x_TH), rtol=1e-4, atol=1e-4)
    columns = torch.cat([parts.shared.down, *parts.down.unbind()], dim=1)
    assert sorted(map(tuple, columns.T.tolist())) == sorted(map(tuple, weights.down.T.tolist()))


def test_the_most_important_channels_are_shared():
    weights, x_TH = dense(), seeded(50, H, seed=1)
    parts = taylor(TaylorSplit(8, 2, 2))(weights, x_TH, 0)
    best_F = taylor_importance(weights, x_TH).topk(2 * F // 8).indices
    assert set(map(tuple, parts.shared.down.T.tolist())) == set(map(tuple, weights.down[:, best_F].T.tolist()))


@pytest.mark.parametrize("by", ["magnitude", "random"])
def test_the_controls_share_other_channels_and_stay_a_partition(by):
    weights, x_TH = dense(), seeded(50, H, seed=1)
    parts = taylor(TaylorSplit(8, 2, 2, by=by))(weights, x_TH, 0)
    torch.testing.assert_close(all_experts(parts, x_TH), output(weights, x_TH), rtol=1e-4, atol=1e-4)
    shared = set(map(tuple, parts.shared.down.T.tolist()))
    best_F = taylor_importance(weights, x_TH).topk(2 * F // 8).indices
    assert shared != set(map(tuple, weights.down[:, best_F].T.tolist()))
    if by == "magnitude":
        norm_F = torch.cat([*weights.gate_up.chunk(2), weights.down.T], dim=1).norm(dim=1)
        assert shared == set(map(tuple, weights.down[:, norm_F.topk(2 * F // 8).indices].T.tolist()))
    else:
        other = taylor(TaylorSplit(8, 2, 2, by=by))(weights, x_TH, 1)
        assert shared != set(map(tuple, other.shared.down.T.tolist()))


def test_shape_and_mistakes():
    shape = ModelShape(H, F, 0, 1, (0,), Selection("one", 1, False))
    made = TaylorSplit(8, 2, 3).reshape(shape)
    assert (made.experts, made.width, made.shared_width, made.selection.k) == (6, 6, 12, 3)
    with pytest.raises(ValueError, match="structure 'split' does without"):
        TaylorSplit(shared=0)
    with pytest.raises(ValueError, match="'taylor' wants one dense gated FFN"):
        taylor(TaylorSplit())(replace(dense(), gated=False), seeded(4, H), 0)
    with pytest.raises(ValueError, match="'taylor' fits its router"):
        taylor(TaylorSplit())(dense(), seeded(0, H), 0)
