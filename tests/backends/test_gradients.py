"""The backward of the backends that declare one, against float64 autograd."""

import pytest
import torch

from moebench.contracts import MoebenchError
from moebench.moe.oracle import Gradients, compare_gradients, reference_gradients

BACKWARD = ("reference", "eager", "grouped")


def gradients(lab, name, dtype, archetype, boundary, count=17):
    """Return (actual gradients, the oracle's, gradient of the weights, the expected one) of one layer."""
    store, routing = lab.store(1, dtype), lab.routing(archetype, count, 3)
    store.gate_up.requires_grad_()
    store.down.requires_grad_()
    x_TH = lab.tokens(count, dtype).requires_grad_()
    grad_TH = lab.tokens(count, dtype, seed=8)
    *where, weights = lab.inputs(routing, boundary)
    weights = weights.clone().requires_grad_()
    spec = lab.spec(store, str(dtype).removeprefix("torch."), boundary, backward=True)
    executor = lab.executor(name, store, spec)
    for _ in range(2):  # a second backward through the same executor must work too
        for leaf in (x_TH, store.gate_up, store.down, weights):
            leaf.grad = None
        executor(x_TH, *where, weights).backward(grad_TH)
    actual = Gradients(x_TH.grad, store.gate_up.grad, store.down.grad)
    return actual, reference_gradients(store, routing, x_TH, grad_TH), weights.grad, (store, routing, x_TH, grad_TH)


@pytest.mark.parametrize("name", BACKWARD)
@pytest.mark.parametrize("boundary", ["topk", "sorted"])
@pytest.mark.parametrize("archetype", ["dynamic_k", "empty", "hot", "signed", "padded", "dropped"])
def test_gradients_are_those_of_the_mathematics(lab, name, boundary, archetype):
    actual, expected, *_ = gradients(lab, name, torch.float32, archetype, boundary)
    verdict = compare_gradients(actual, expected, torch.float32)
    assert verdict.ok, verdict


@pytest.mark.parametrize("name", ["eager", "grouped"])
def test_gradients_in_bfloat16(lab, name):
    actual, expected, *_ = gradients(lab, name, torch.bfloat16, "dynamic_k", "topk")
    assert compare_gradients(actual, expected, torch.bfloat16).ok


@pytest.mark.parametrize("name", BACKWARD)
def test_the_gradient_of_a_weight_is_the_experts_output_times_the_output_gradient(lab, name):
    _, _, grad_N, (store, routing, x_TH, grad_TH) = gradients(lab, name, torch.float32, "dynamic_k", "sorted")
    token_N, offsets_E1, _ = routing.sorted()
    for expert, (gate_up, down) in enumerate(zip(store.gate_up, store.down, strict=True)):
        mine = slice(int(offsets_E1[expert]), int(offsets_E1[expert + 1]))
        gate, up = (x_TH[token_N[mine]] @ gate_up.T).chunk(2, -1)
        out_NH = (torch.nn.functional.silu(gate) * up) @ down.T
        torch.testing.assert_close(grad_N[mine], (out_NH * grad_TH[token_N[mine]]).sum(1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("changed", ["x_TH", "gate_up", "down"])
def test_a_wrong_gradient_is_found(lab, changed):
    actual, expected, *_ = gradients(lab, "eager", torch.float32, "dynamic_k", "topk")
    wrong = {name: getattr(actual, name).clone() for name in ("x_TH", "gate_up", "down")}
    largest = int(wrong[changed].flatten(1).norm(dim=1).argmax())
    wrong[changed][largest] *= 1.01
    verdict = compare_gradients(Gradients(**wrong), expected, torch.float32)
    assert not verdict.ok
    assert changed in verdict.reason
    wrong[changed][0] = float("nan")
    assert "not finite" in compare_gradients(Gradients(**wrong), expected, torch.float32).reason


def test_weights_that_would_have_to_be_converted_are_refused(lab):
    store = lab.store(dtype=torch.float32)
    with pytest.raises(MoebenchError, match="needs dense weights in bfloat16"):
        lab.executor("eager", store, lab.spec(store, "bfloat16", backward=True))
