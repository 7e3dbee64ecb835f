"""Gradients of the interpreted layer against float64 autograd: of the input, the experts and the routing weights."""

import pytest
import torch

from moebench.moe.experts import ExpertStore
from moebench.moe.oracle_gradients import Gradients, compare_gradients, reference_gradients
from moebench.moe.routing import Routing


def made(lab, dtype, boundary, activation="silu", gated=True, tokens=7):
    """Gradients of a layer whose sizes no tile divides, the routing weights with theirs, and what they are made of."""
    generator = torch.Generator().manual_seed(2)
    rows = 80 if gated else 40
    gate_up, down = (torch.randn(shape, generator=generator) / 7 for shape in ((3, rows, 56), (3, 56, 40)))
    store = ExpertStore(gate_up.to(dtype), down.to(dtype), ("ffn",) * 3, activation, gated)
    chosen_TE = torch.rand(tokens, 3, generator=generator) < 0.6
    routing = Routing.dense(torch.where(chosen_TE, torch.randn(tokens, 3, generator=generator), 0.0))
    x_TH, grad_TH = (torch.randn(tokens, 56, generator=generator).to(dtype) for _ in range(2))
    *where, weights = lab.inputs(routing, boundary)
    for leaf in (x_TH, store.gate_up, store.down, weights):
        leaf.requires_grad_()
    spec = lab.spec(store, str(dtype).removeprefix("torch."), boundary, backward=True)
    lab.executor("triton", store, spec)(x_TH, *where, weights).backward(grad_TH)
    actual = Gradients(x_TH.grad, store.gate_up.grad, store.down.grad)
    return actual, weights, (store, routing, x_TH, grad_TH)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("boundary", ["topk", "sorted"])
def test_gradients(lab, dtype, boundary):
    actual, _, call = made(lab, dtype, boundary)
    verdict = compare_gradients(actual, reference_gradients(*call), dtype)
    assert verdict.ok, verdict


@pytest.mark.parametrize(("activation", "gated"), [("gelu", True), ("silu", False)])
def test_gradients_of_other_activations(lab, activation, gated):
    actual, _, call = made(lab, torch.float32, "topk", activation, gated)
    assert compare_gradients(actual, reference_gradients(*call), torch.float32).ok


@pytest.mark.parametrize("boundary", ["topk", "sorted"])
def test_the_gradient_of_a_weight_is_the_experts_output_times_the_output_gradient(lab, boundary):
    _, weights, (store, routing, x_TH, grad_TH) = made(lab, torch.float32, boundary)
    product = torch.einsum("th,erh->ter", x_TH, store.gate_up)
    gate, up = product.chunk(2, -1)
    out_TEH = torch.einsum("tef,ehf->teh", torch.nn.functional.silu(gate) * up, store.down)
    grad_TE = (out_TEH * grad_TH[:, None]).sum(-1).detach()
    if boundary == "sorted":
        token_N, offsets_E1, _ = routing.sorted()
        expert_N = torch.arange(3).repeat_interleave(offsets_E1.diff().long())
        torch.testing.assert_close(weights.grad, grad_TE[token_N, expert_N], rtol=1e-4, atol=1e-5)
        return
    indices_TK, _ = lab.inputs(routing, "topk")
    real_TK = indices_TK < 3
    expected_TK = torch.where(real_TK, grad_TE.gather(1, indices_TK.clamp(max=2)), 0.0)
    assert not real_TK.all()
    torch.testing.assert_close(weights.grad, expected_TK, rtol=1e-4, atol=1e-5)


def test_a_call_without_tokens_has_gradients_of_zero(lab):
    actual, *_ = made(lab, torch.float32, "topk", tokens=0)
    assert not actual.gate_up.any()
    assert not actual.down.any()
    assert actual.x_TH.shape == (0, 56)
