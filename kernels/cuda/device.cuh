// The few instructions that the kernels need beyond C++, for NVRTC as inline PTX; the host shim has its own of each.
// No header is included, so that NVRTC compiles this with nothing but this folder.
#pragma once

#ifdef MOE_HOSTSIM
#include "shim/hostsim.h"
#else

#define DYN_SMEM(name) extern __shared__ __align__(16) unsigned char name[]

struct Bf16 {
  unsigned short bits;
};
struct F16 {
  unsigned short bits;
};

// --- to 16 bits, rounded to nearest with ties to even, and back -----------------------------------------------------------

__device__ __forceinline__ Bf16 rounded(float value, Bf16) {
  Bf16 made;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(made.bits) : "f"(value));
  return made;
}
__device__ __forceinline__ F16 rounded(float value, F16) {
  F16 made;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(made.bits) : "f"(value));
  return made;
}

__device__ __forceinline__ float widened(Bf16 value) { return __uint_as_float(static_cast<unsigned>(value.bits) << 16); }
__device__ __forceinline__ float widened(F16 value) {
  float made;
  asm("cvt.f32.f16 %0, %1;" : "=f"(made) : "h"(value.bits));
  return made;
}

// --- tensor cores: D += A B, A 16x16 by rows, B 16x8 by columns, fragments as PTX ISA lays out m16n8k16 --------------

__device__ __forceinline__ void mma(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], Bf16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void mma(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], F16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// --- asynchronous copies of 16 bytes into shared memory: the first `bytes` (0 or 16) of them, zeros behind -----------

__device__ __forceinline__ void cp_async16(void* shared, const void* global, int bytes) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(bytes) : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// --- memory that blocks share: everything else is ordered by these (and by __syncthreads within a block) -------------

__device__ __forceinline__ unsigned long long load_acquire(const unsigned long long* from) {
  unsigned long long value;
  asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(from) : "memory");
  return value;
}
__device__ __forceinline__ void store_release(unsigned long long* to, unsigned long long value) {
  asm volatile("st.release.gpu.global.u64 [%0], %1;" ::"l"(to), "l"(value) : "memory");
}
__device__ __forceinline__ int fetch_add(int* to, int value) {
  int before;
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], %2;" : "=r"(before) : "l"(to), "r"(value) : "memory");
  return before;
}

// The same across devices.
__device__ __forceinline__ unsigned long long load_acquire_system(const unsigned long long* from) {
  unsigned long long value;
  asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(from) : "memory");
  return value;
}
__device__ __forceinline__ void store_release_system(unsigned long long* to, unsigned long long value) {
  asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(to), "l"(value) : "memory");
}
__device__ __forceinline__ void add_release_system(unsigned long long* to, unsigned long long value) {
  asm volatile("red.release.sys.global.add.u64 [%0], %1;" ::"l"(to), "l"(value) : "memory");
}

// Sums whose order does not matter to anybody: no ordering of other memory.
__device__ __forceinline__ void add_float(float* to, float value) { atomicAdd(to, value); }
__device__ __forceinline__ int count_shared(int* to) { return atomicAdd(to, 1); }

__device__ __forceinline__ void backoff() { asm volatile("nanosleep.u32 64;"); }

#endif  // MOE_HOSTSIM
