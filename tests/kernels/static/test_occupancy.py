"""The occupancy formula, against NVIDIA's own header compiled by the host's compiler."""

from __future__ import annotations

import ctypes
import shutil
import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moebench.contracts import MoebenchError
from moebench.kernels.cuda import nvrtc
from moebench.kernels.occupancy import Occupancy, occupancy
from moebench.kernels.targets import DEVICES, KIB, TARGETS, device, target

CUDA = [one for one in TARGETS.values() if one.platform == "CUDA"]

HOST = r"""
#include <cuda_occupancy.h>
extern "C" int blocks(int major, int minor, int threads_sm, int shared_sm, int optin, int threads, int regs, int shared)
{
    cudaOccDeviceProp p{};
    p.computeMajor = major; p.computeMinor = minor; p.maxThreadsPerBlock = 1024;
    p.maxThreadsPerMultiprocessor = threads_sm; p.regsPerBlock = 65536; p.regsPerMultiprocessor = 65536;
    p.warpSize = 32; p.sharedMemPerBlock = 48 * 1024; p.sharedMemPerMultiprocessor = shared_sm; p.numSms = 1;
    p.sharedMemPerBlockOptin = optin; p.reservedSharedMemPerBlock = 1024;
    cudaOccFuncAttributes a{};
    a.maxThreadsPerBlock = 1024; a.numRegs = regs; a.partitionedGCConfig = PARTITIONED_GC_OFF;
    a.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN; a.maxDynamicSharedSizeBytes = shared;
    cudaOccDeviceState s{};
    cudaOccResult r{};
    if (cudaOccMaxActiveBlocksPerMultiprocessor(&r, &p, &a, &s, threads, shared) != CUDA_OCC_SUCCESS) return -1;
    return r.activeBlocksPerMultiprocessor;
}
"""


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    compiler = shutil.which("g++")
    if compiler is None or nvrtc.missing():
        pytest.skip("g++ or NVIDIA's header is not installed")
    folder = tmp_path_factory.mktemp("occupancy")
    (folder / "host.cc").write_text(HOST)
    flags = ["-shared", "-fPIC", f"-I{nvrtc.cuda_headers()}", "host.cc", "-o", "host.so"]
    subprocess.run([compiler, *flags], cwd=folder, check=True)
    library = ctypes.CDLL(str(folder / "host.so"))

    def blocks(one, threads, registers, shared):
        major, minor = divmod(one.arch, 10)
        limits = (one.threads_per_processor, one.shared_per_processor, one.shared_per_block + one.shared_reserved)
        found = library.blocks(major, minor, *limits, threads, registers, shared)
        assert found >= 0 or shared > one.shared_per_block  # which it calls invalid input
        return max(0, found)

    return blocks


@settings(max_examples=500, deadline=None)
@given(
    one=st.sampled_from(CUDA),
    threads=st.integers(1, 1100),
    registers=st.integers(1, 255),
    shared=st.integers(0, 240 * KIB),
)
def test_blocks_are_those_of_the_official_header(official, one, threads, registers, shared):
    assert occupancy(one, threads, registers, shared).blocks == official(one, threads, registers, shared)


@pytest.mark.parametrize("one", CUDA, ids=lambda one: one.name)
def test_the_edges_of_shared_memory_are_those_of_the_official_header(official, one):
    for shared in (0, 1, one.shared_per_block - 1, one.shared_per_block, one.shared_per_block + 1):
        assert occupancy(one, 128, 32, shared).blocks == official(one, 128, 32, shared)


def test_what_limits_is_named():
    sm_90 = target("sm_90")
    assert occupancy(sm_90, 128, 255, 0).limits == ("registers",)
    assert occupancy(sm_90, 128, 32, 100 * KIB) == Occupancy(2, 8 / 64, ("shared memory",))
    assert occupancy(sm_90, 1024, 32, 0) == Occupancy(2, 1.0, ("registers", "threads"))
    assert occupancy(sm_90, 32, 16, 0).limits == ("blocks",)
    assert occupancy(sm_90, 32, 0, 0).limits == ("registers", "blocks")


@given(one=st.sampled_from(list(TARGETS.values())), warps=st.integers(1, 16), registers=st.integers(1, 255))
def test_more_shared_memory_or_registers_never_help(one, warps, registers):
    threads = warps * one.warp
    blocks = [occupancy(one, threads, registers, shared * KIB).blocks for shared in range(0, 232, 8)]
    assert blocks == sorted(blocks, reverse=True)
    assert occupancy(one, threads, registers + 1, 0).blocks <= occupancy(one, threads, registers, 0).blocks


def test_waves_of_cdna3_by_registers():
    """512 registers a lane of a SIMD, given in eights, eight waves at most."""
    waves = {64: 8, 65: 7, 72: 7, 80: 6, 96: 5, 128: 4, 168: 3, 256: 2, 257: 1, 512: 1, 513: 0}
    for registers, per_simd in waves.items():
        assert occupancy(target("gfx942"), 64, registers, 0).blocks == 4 * per_simd


def test_a_block_has_threads():
    with pytest.raises(ValueError, match="at least 1"):
        occupancy(target("sm_80"), 0, 1, 0)


def test_devices_are_of_known_targets_and_a_mistyped_name_gets_the_nearest():
    assert {one.target for one in DEVICES.values()} == TARGETS.keys()
    with pytest.raises(MoebenchError, match="did you mean 'h100-sxm'"):
        device("h100")
    with pytest.raises(MoebenchError, match="did you mean 'sm_90'"):
        target("sm90")
