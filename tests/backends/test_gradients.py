"""The backward of the backends that declare one, against float64 autograd."""

import pytest
import torch

from moebench.contracts import MoebenchError
from moebench.moe.oracle_gradients import Gradients, compare_gradients

BACKWARD = ("reference", "eager", "grouped")


@pytest.mark.parametrize("name", ["eager", "grouped"])
def test_gradients_in_bfloat16(lab, name):
    actual, expected, *_ = lab.gradients(name, torch.bfloat16, "dynamic_k", "topk")
    assert compare_gradients(actual, expected, torch.bfloat16).ok


@pytest.mark.parametrize("name", BACKWARD)
def test_the_gradient_of_a_weight_is_the_experts_output_times_the_output_gradient(lab, name):
    _, _, grad_N, (store, routing, x_TH, grad_TH) = lab.gradients(name, torch.float32, "dynamic_k", "sorted")
    token_N, offsets_E1, _ = routing.sorted()
    for expert, (gate_up, down) in enumerate(zip(store.gate_up, store.down, strict=True)):
        mine = slice(int(offsets_E1[expert]), int(offsets_E1[expert + 1]))
        gate, up = (x_TH[token_N[mine]] @ gate_up.T).chunk(2, -1)
        out_NH = (torch.nn.functional.silu(gate) * up) @ down.T
        torch.testing.assert_close(grad_N[mine], (out_NH * grad_TH[token_N[mine]]).sum(1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("changed", ["x_TH", "gate_up", "down"])
def test_a_wrong_gradient_is_found(lab, changed):
    actual, expected, *_ = lab.gradients("eager", torch.float32, "dynamic_k", "topk")
    wrong = {name: getattr(actual, name).clone() for name in ("x_TH", "gate_up", "down")}
    largest = int(wrong[changed].flatten(1).norm(dim=1).argmax())
    wrong[changed][largest] *= 1.01
    verdict = compare_gradients(Gradients(**wrong), expected, torch.float32)
    assert not verdict.ok
    assert changed in verdict.reason
    wrong[changed][0] = float("nan")
    assert "not finite" in compare_gradients(Gradients(**wrong), expected, torch.float32).reason


def test_a_few_tokens_without_their_gradient_are_found(lab):
    actual, expected, *_ = lab.gradients("eager", torch.float32, "dynamic_k", "topk")
    many = Gradients(expected.x_TH.repeat(200, 1), expected.gate_up, expected.down)
    wrong_TH = actual.x_TH.repeat(200, 1)
    assert compare_gradients(Gradients(wrong_TH, actual.gate_up, actual.down), many, torch.float32).ok
    wrong_TH[int(expected.x_TH.norm(dim=1).argmax())] = 0
    assert float((wrong_TH - many.x_TH).norm() / many.x_TH.norm()) < 0.1
    verdict = compare_gradients(Gradients(wrong_TH, actual.gate_up, actual.down), many, torch.float32)
    assert verdict.error == pytest.approx(1)


def test_weights_that_would_have_to_be_converted_are_refused(lab):
    store = lab.store(dtype=torch.float32)
    with pytest.raises(MoebenchError, match="needs dense weights in bfloat16"):
        lab.executor("eager", store, lab.spec(store, "bfloat16", backward=True))
