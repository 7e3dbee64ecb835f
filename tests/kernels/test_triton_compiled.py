"""The kernels compile for devices that are not here: in a process of their own, where nothing is interpreted."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the Triton kernels need triton 3.7")

SCRIPT = """
import json, sys
import torch
from triton.backends.compiler import GPUTarget
from moebench.backends.triton import Triton
from moebench.backends.plugins import Triton as Params
from moebench.contracts import MoebenchError
from moebench.kernels.triton.grouped import Experts
from moebench.kernels.triton.launch import compiling
from moebench.kernels.triton.layer import Plan, topk_layer
from moebench.kernels.triton.tiles import Tiles
from moebench.kernels.triton.weights import Matrices

def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")

def coded(outputs, inputs):
    parts = (8, outputs, inputs // 2), (8, outputs, inputs // 32)
    codes, scales = (empty(*shape, dtype=torch.uint8) for shape in parts)
    return Matrices(codes, "mxfp4_scaled", outputs, inputs, scales, group=32)

found = []
dense = Experts(Matrices.dense(empty(8, 512, 256)), Matrices.dense(empty(8, 256, 256)))
scaled = Experts(coded(512, 256), coded(256, 256))
tiles = Tiles(64, 64, 64, 4, 3)
for target, experts in ((GPUTarget("cuda", 90, 32), dense), (GPUTarget("cuda", 100, 32), scaled)):
    x_TH, indices_TK = empty(128, 256), empty(128, 2, dtype=torch.int64)
    plan = Plan(tiles, tiles)
    with compiling(target) as compiled:
        topk_layer(x_TH, indices_TK, empty(128, 2, dtype=torch.float32), experts, torch.empty_like(x_TH), plan)
    for one in compiled:
        ptx = one.binary.asm["ptx"]
        tensor_cores = "wgmma" in ptx or "tcgen05.mma" in ptx or "mma.sync" in ptx
        found.append([one.name, one.target.arch, list(one.grid), len(one.binary.asm["cubin"]), tensor_cores])
try:
    Triton(Params()).load({}, {})
    said = ""
except MoebenchError as error:
    said = str(error)
print(json.dumps([found, said]))
"""
"""Sizes are small and tensors have no storage: compiling asks for neither."""


def test_what_is_launched_is_what_is_compiled():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(Path(tempfile.gettempdir()) / "moebench-tests-triton")
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found, said = json.loads(done.stdout)
    names = ["count_kernel", "place_kernel", "gate_up_kernel", "down_kernel", "combine_kernel"]
    assert [(name, arch) for name, arch, *_ in found] == [(name, arch) for arch in (90, 100) for name in names]
    assert all(size > 1000 for *_, size, _ in found)
    assert [on for *_, on in found] == [name in ("gate_up_kernel", "down_kernel") for name in names] * 2
    assert {tuple(grid) for name, _, grid, *_ in found if name == "down_kernel"} == {(11, 4)}
    from moebench.kernels import devices

    if devices.missing("CUDA", "ROCm"):
        assert said.endswith("this process compiles its kernels; start it with TRITON_INTERPRET=1 in its environment.")
