"""What a kernel is made of, read off code that was compiled here."""

from __future__ import annotations

import pytest

from moebench.contracts import MoebenchError
from moebench.kernels.cuda.nvrtc import Source, compile_source
from moebench.kernels.isa import AMD_KINDS, CUDA_KINDS, Code, count_kinds, of_amd_text, resources, tool
from moebench.kernels.targets import TARGETS

CUDA = [one.name for one in TARGETS.values() if one.platform == "CUDA"]

KERNELS = r"""
extern "C" __global__ void plain(float* x) { x[threadIdx.x] += 1.f; }

extern "C" __global__ void shared_sum(float* x)
{
    __shared__ float rows[512];
    rows[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    atomicAdd(x, rows[(threadIdx.x + 7) % 512]);
}

extern "C" __global__ void __launch_bounds__(1024, 1) spilling(const float* __restrict__ x, float* y, int n)
{
    float kept[200];
#pragma unroll
    for (int i = 0; i < 200; ++i) kept[i] = x[i * 1024 + threadIdx.x];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 200; ++i) y[i * n] = kept[(i * 7) % 200] * kept[i];
}
"""


def found(name, target):
    cubin = compile_source(Source("toy.cu", KERNELS), target)
    return resources(Code(name, TARGETS[target], 512, 0, binary=cubin))


@pytest.mark.usefixtures("nvrtc_here")
@pytest.mark.parametrize("target", CUDA)
def test_shared_memory_barriers_and_atomics_are_found(target):
    one = found("shared_sum", target)
    assert (one.shared, one.stack, one.spills) == (2048, 0, 0)  # without what the driver adds from sm_90 on
    assert one.kinds["barrier"] >= 1
    assert one.kinds["atomic"] == 1
    assert one.kinds["tensor"] == 0


@pytest.mark.usefixtures("nvrtc_here")
def test_a_kernel_without_shared_memory_has_none():
    assert found("plain", "sm_90").shared == 0


@pytest.mark.usefixtures("nvrtc_here")
def test_spills_are_found_though_registers_look_well():
    spilling = found("spilling", "sm_80")
    assert spilling.spills > 0
    assert spilling.stack > 0
    assert spilling.registers <= 64  # all that 1024 threads may have


@pytest.mark.usefixtures("nvrtc_here")
def test_a_kernel_that_is_not_in_the_code_is_told_with_those_that_are():
    cubin = compile_source(Source("toy.cu", KERNELS), "sm_80")
    with pytest.raises(MoebenchError, match=r"no kernel 'absent' but .*plain"):
        resources(Code("absent", TARGETS["sm_80"], 32, 0, binary=cubin))


@pytest.mark.usefixtures("nvrtc_here")
def test_what_is_no_code_is_told():
    with pytest.raises(MoebenchError, match="cannot read the code"):
        resources(Code("plain", TARGETS["sm_80"], 32, 0, binary=b"no cubin"))


@pytest.mark.parametrize("target", TARGETS)
def test_a_product_of_triton_uses_tensor_cores_and_does_not_spill(triton_codes, target):
    one = triton_codes[target]
    assert (one["stack"], one["spills"]) == (0, 0)
    assert one["kinds"]["tensor"] > 0
    assert one["kinds"]["barrier"] > 0
    assert (one["kinds"]["async_copy"] > 0) == TARGETS[target].async_copy
    assert one["shared"] >= 2 * 64 * 32 * 2  # two operands of bfloat16, once at least


def test_opcodes_are_counted_by_kind():
    cuda = {"HMMA": 2, "UTCQMMA": 1, "HGMMA": 4, "LDL": 1, "STL": 2, "BAR": 1, "UTCBAR": 9, "HFMA2": 9, "REDUX": 9}
    assert count_kinds(cuda, CUDA_KINDS) == {"tensor": 7, "async_copy": 0, "barrier": 1, "atomic": 0, "spill": 3}
    amd = {"v_mfma_f32_32x32x8_bf16": 3, "global_atomic_add_f32": 1, "s_barrier": 1, "global_load_dwordx4": 5}
    assert count_kinds(amd, AMD_KINDS) == {"tensor": 3, "async_copy": 0, "barrier": 1, "atomic": 1}


def test_text_without_metadata_is_no_kernel():
    with pytest.raises(MoebenchError, match="tells no vgpr_count"):
        of_amd_text("\ts_barrier\n", 0)


def test_a_tool_that_is_absent_is_told_with_the_remedy():
    with pytest.raises(MoebenchError, match=r"absent is not installed; run pip install 'moebench\[static\]'"):
        tool("absent")
