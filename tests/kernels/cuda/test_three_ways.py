"""Triton, interpreted, CUDA, on the host shim, and the float64 oracle say the same of the layers of one file."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import three_ways
import torch
from cuda_problems import routing

from moebench.kernels.cuda import host
from moebench.moe.oracle import compare, reference

pytest.importorskip("triton", reason="the Triton kernels need triton 3.7")
pytestmark = pytest.mark.skipif(bool(host.missing()), reason=host.missing() or "-")

PRODUCT = 2 * 16 * 8 * 16
"""Operations of one product of a warp."""


def layer(dtype, kind, tokens, experts, hidden, width, whole=False):
    """Return one layer as the file has it; ``whole`` numbers are small enough that nothing is rounded on the way."""
    generator = torch.Generator().manual_seed(tokens)
    chosen = routing(kind, tokens, experts, 3)
    shapes = (tokens, hidden), (experts, 2 * width, hidden), (experts, hidden, width)
    if whole:
        x_TH, gate_up, down = (torch.randint(-1, 2, shape, generator=generator) for shape in shapes)
        weight_N = torch.randint(-2, 3, chosen.weight_N.shape, generator=generator).float()
    else:
        x_TH, gate_up, down = (torch.randn(shape, generator=generator) for shape in shapes)
        gate_up, down, weight_N = gate_up / hidden**0.5, down / width**0.5, chosen.weight_N
    numbers = {"x_TH": x_TH.to(dtype), "gate_up": gate_up.to(dtype), "down": down.to(dtype), "weight_N": weight_N}
    return {
        **numbers,
        "token_N": chosen.token_N,
        "expert_N": chosen.expert_N,
        "activation": "relu" if whole else "silu",
    }


LAYERS = {
    "bfloat16": (torch.bfloat16, "dynamic_k", 19, 5, 56, 40),
    "float16": (torch.float16, "signed", 19, 5, 56, 40),
    "whole": (torch.bfloat16, "dynamic_k", 18, 5, 24, 20, True),
    "even": (torch.bfloat16, "hot", 64, 2, 64, 64),
}
"""Sizes that no tile divides, whole numbers, and sizes that every tile divides."""


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """By layer: (experts, routing, x_TH), what Triton says of it, and what CUDA does; each way of each backend."""
    folder = tmp_path_factory.mktemp("three_ways")
    file, answers = folder / "layers", folder / "answers"
    torch.save({name: layer(*of) for name, of in LAYERS.items()}, file)
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, str(Path(three_ways.__file__)), str(file), str(answers)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    told, found = torch.load(answers, weights_only=True), {}
    for name, of in three_ways.read(file).items():
        triton = [told[f"{name} {number}"] for number in range(len(three_ways.WAYS["triton"]))]
        cuda = []
        for params in three_ways.WAYS["cuda_fused"]:
            out_TH, executor = three_ways.run("cuda_fused", params, *of)
            (event,) = executor.events()
            cuda.append({"out_TH": out_TH, "flops": PRODUCT * event["mma"]})
        found[name] = of, triton, cuda
    return found


@pytest.mark.parametrize("name", LAYERS)
def test_each_agrees_with_the_others_within_the_dtypes_bound(said, name):
    (store, routed, x_TH), triton, cuda = said[name]
    expected = reference(store, routed, x_TH)
    for one in (*triton, *cuda):
        verdict = compare(one["out_TH"], expected, x_TH.dtype)
        assert verdict.ok, verdict
    for one in triton:
        for other in cuda:
            verdict = compare(one["out_TH"], replace(expected, y_TH=other["out_TH"].double()), x_TH.dtype)
            assert verdict.ok, verdict


def test_whole_numbers_are_the_same_bits_three_ways(said):
    (store, routed, x_TH), triton, cuda = said["whole"]
    expected_TH = reference(store, routed, x_TH).y_TH.to(x_TH.dtype)
    assert expected_TH.any()
    assert all(torch.equal(one["out_TH"], expected_TH) for one in (*triton, *cuda))


def test_products_are_counted_alike_and_are_those_of_the_formula(said):
    """Where tiles divide all sizes nothing is padded: three matrices, two operations a weight and assignment."""
    (store, routed, _), triton, cuda = said["even"]
    expected = 2 * 3 * len(routed.token_N) * store.hidden * store.width
    assert [one["flops"] for one in (*triton, *cuda)] == [expected] * 6
