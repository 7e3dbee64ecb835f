"""Backend ``cuda_fused``: right over the contract's routings by the host shim; what it gives a device's driver."""

from __future__ import annotations

import ctypes

import pytest
import torch

from moebench.backends import cuda_fused
from moebench.backends.plugins import CudaFused as Params
from moebench.contracts import Evidence, MoebenchError, Scheme
from moebench.kernels import devices
from moebench.kernels.cuda import host, nvrtc
from moebench.kernels.cuda.layer import Tiles

DTYPES = (torch.bfloat16, torch.float16)
pytestmark = pytest.mark.skipif(bool(host.missing()), reason=host.missing() or "-")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("boundary", "count"), [("topk", 17), ("sorted", 3), ("topk", 0)])
def test_it_agrees_with_the_oracle(lab, dtype, boundary, count):
    for archetype in lab.archetypes:
        store = lab.store(3, dtype, some_kinds=lab.kinds(archetype))
        lab.check("cuda_fused", store, dtype, archetype, count, boundary, 11)


@pytest.mark.parametrize(("activation", "gated"), [("gelu", True), ("relu", True), ("relu", False), ("silu", False)])
def test_other_activations_and_ungated_experts(lab, activation, gated):
    store = lab.store(1, torch.bfloat16, activation=activation, gated=gated)
    lab.check("cuda_fused", store, torch.bfloat16, "signed", 17, "sorted", 5)


def test_quantized_weights_are_dequantized(lab):
    store = lab.store(3, torch.bfloat16, Scheme("rtn", 4.0, 32, symmetric=False))
    lab.check("cuda_fused", store, torch.bfloat16, "dynamic_k", 17, "topk", 11)


def executor(lab, store, launcher=None, **params):
    made = Params(**params)
    spec = lab.spec(store, "bfloat16", "sorted")
    if launcher is None:
        return cuda_fused.CudaFused(made).load({0: store}, {0: spec}).layer(0)
    return cuda_fused.CudaFusedExecutor(store, spec, made, lambda device: launcher, Tiles())


def test_variants_give_the_same_bits_and_calls_of_other_sizes_follow_each_other(lab):
    store = lab.store(1, torch.bfloat16)
    fused, two = (executor(lab, store, variant=name) for name in ("fused", "two_kernels"))
    for count, archetype in ((17, "dynamic_k"), (17, "hot"), (5, "dropped"), (17, "empty")):
        x_TH, inputs = lab.tokens(count, torch.bfloat16), lab.inputs(lab.routing(archetype, count, 1), "sorted")
        assert torch.equal(fused(x_TH, *inputs), two(x_TH, *inputs))


@pytest.mark.parametrize("variant", ["fused", "two_kernels"])
def test_atomic_sums_agree_with_the_oracle_twice(lab, variant):
    store, x_TH = lab.store(1, torch.bfloat16), lab.tokens(17, torch.bfloat16)
    run = executor(lab, store, variant=variant, combine="atomic")
    for archetype in ("dynamic_k", "dropped"):
        routing = lab.routing(archetype, 17, 1)
        verdict = lab.compare(
            run(x_TH, *lab.inputs(routing, "sorted")), lab.reference(store, routing, x_TH), x_TH.dtype
        )
        assert verdict.ok, verdict


def test_one_launch_a_layer_or_two(lab):
    store, x_TH = lab.store(1, torch.bfloat16), lab.tokens(17, torch.bfloat16)
    for variant, number in (("fused", 1), ("two_kernels", 2)):
        run = executor(lab, store, variant=variant)
        run(x_TH, *lab.inputs(lab.routing("dynamic_k", 17, 1), "sorted"))
        (event,) = run.events()
        assert event["launches"] == number
        assert len(run.kernels) == number
        assert "host shim" in run.kernels[0]


def test_an_output_that_is_not_in_one_piece_is_filled(lab):
    store, x_TH = lab.store(1, torch.bfloat16), lab.tokens(9, torch.bfloat16)
    inputs, run = lab.inputs(lab.routing("dynamic_k", 9, 1), "sorted"), executor(lab, store)
    wide_TH = torch.full((9, 2 * x_TH.shape[1]), float("nan"), dtype=torch.bfloat16)
    out_TH = wide_TH[:, ::2]
    assert torch.equal(run(x_TH, *inputs, out_TH=out_TH), run(x_TH, *inputs))
    assert wide_TH[:, 1::2].isnan().all()


# --- where there is a device, and where there is nothing -------------------------------------------------------------


def test_availability_says_where_it_runs(monkeypatch):
    backend = cuda_fused.CudaFused(Params())
    monkeypatch.setattr(devices, "missing", lambda *_: "no CUDA device: none")
    here = backend.availability()
    assert (here.available, here.timed, here.devices, here.reason) == (True, False, ("cpu",), "no CUDA device: none")
    assert here.evidence == (Evidence.HOST_EXECUTED, Evidence.STATIC_COMPILE)
    monkeypatch.setenv("CXX", "no-such-compiler")
    nowhere = backend.availability()
    assert not nowhere.available
    assert nowhere.reason == (
        "no CUDA device: none; the host shim of the CUDA kernels needs a C++ compiler; "
        "install g++ or clang++, or name one in CXX"
    )
    with pytest.raises(MoebenchError, match=r"needs a C\+\+ compiler"):
        host.Shim(Tiles())
    monkeypatch.setattr(devices, "missing", lambda *_: "")
    monkeypatch.setattr(nvrtc, "missing", lambda: "")
    there = backend.availability()
    assert (there.timed, there.devices, there.evidence) == (True, ("cuda",), (Evidence.MEASURED_GPU,))


def test_tensors_of_the_cpu_go_to_the_shim_where_there_is_a_device_too(lab, monkeypatch):
    monkeypatch.setattr(devices, "missing", lambda *_: "")
    run = executor(lab, lab.store(1, torch.bfloat16))
    assert isinstance(run.launcher, cuda_fused.HostLauncher)


class ShimDriver:
    """A driver whose device is the host shim: it gets the addresses of arguments that cuLaunchKernel would get."""

    def __init__(self):
        self.shared, self.code = {}, b""

    def arch(self):
        return "sm_90"

    def load(self, code):
        self.code = code

    def function(self, module, name):
        return name

    def allow_shared(self, function, size):
        self.shared[function] = size

    def launch(self, function, grid, block, shared, arguments):
        assert grid[1:] == block[1:] == (1, 1)
        pointers = ctypes.cast(arguments, ctypes.POINTER(ctypes.c_void_p))
        one, report = host.NamedGrid(function.encode(), grid[0], block[0], shared, pointers), host.Report()
        shim = host.shim(Tiles()).library
        assert shim.sim_launch(ctypes.byref(one), 1, host.Schedule().numbers, ctypes.byref(report)) == 0, report.message


@pytest.mark.parametrize("variant", ["fused", "two_kernels"])
def test_a_device_gets_the_launches_and_arguments_that_the_shim_gets(lab, monkeypatch, variant):
    monkeypatch.setattr(nvrtc, "compile_source", lambda source, arch: f"{source.name} {arch}".encode())
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: type("Device", (), {"multi_processor_count": 3}))
    store, x_TH = lab.store(1, torch.bfloat16), lab.tokens(17, torch.bfloat16)
    inputs, fake = lab.inputs(lab.routing("dynamic_k", 17, 1), "sorted"), ShimDriver()
    launcher = cuda_fused.DeviceLauncher(fake, Tiles(), "bfloat16")
    assert (fake.code, launcher.blocks) == (b"moe.cuh sm_90", 6)
    run = executor(lab, store, launcher, variant=variant)
    assert torch.equal(run(x_TH, *inputs), executor(lab, store)(x_TH, *inputs))
    assert list(run.events()) == []
    assert fake.shared == {}  # these tiles fit into what every kernel may have
