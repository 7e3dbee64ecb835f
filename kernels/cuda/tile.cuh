// One tile of a grouped product: rows of A gathered by offsets, columns of one or two matrices B, float32 sums.
#pragma once
#include "device.cuh"

#ifndef MOE_BM
#define MOE_BM 64  // assignments of a tile
#endif
#ifndef MOE_BN
#define MOE_BN 64  // columns of a tile (of gate and of up each)
#endif
#ifndef MOE_BK
#define MOE_BK 32  // depth of one step
#endif
#ifndef MOE_STAGES
#define MOE_STAGES 3  // steps in shared memory at once
#endif
#ifndef MOE_WARPS_M
#define MOE_WARPS_M 2
#endif
#ifndef MOE_WARPS_N
#define MOE_WARPS_N 2
#endif

constexpr int BM = MOE_BM, BN = MOE_BN, BK = MOE_BK, STAGES = MOE_STAGES;
constexpr int WARPS = MOE_WARPS_M * MOE_WARPS_N, THREADS = 32 * WARPS;
constexpr int WARP_ROWS = BM / MOE_WARPS_M, WARP_COLS = BN / MOE_WARPS_N;
constexpr int MT = WARP_ROWS / 16, NT = WARP_COLS / 8;  // products of 16 x 8 that a warp holds
constexpr int CHUNK = 8;                                // elements in 16 bytes
constexpr int LD = BK + CHUNK;                          // padded rows: the eight rows of a fragment lie in distinct banks
constexpr int TOKEN_TILE = 4 * WARPS;                   // tokens that one dispatch or combine task serves

static_assert(BM % (16 * MOE_WARPS_M) == 0 && BN % (8 * MOE_WARPS_N) == 0 && BK % 16 == 0, "tiles are whole products");
static_assert(STAGES >= 2, "a copy and a product at once take two stages");

// All of a block's shared memory; `starts` has experts + 1 entries and ends it.
struct Shared {
  unsigned short a[STAGES][BM][LD];
  unsigned short b[STAGES][2][BN][LD];
  long long row[BM];  // where each row of A begins, -1 for none
  int released[BM];   // token tiles whose last row this block wrote
  int num_released;
  int task;
  int rows;           // of the packet that this block works on
  int starts[2];  // first row block of each expert
};

__device__ __forceinline__ int ceil_div(int a, int b) { return (a + b - 1) / b; }
__device__ __forceinline__ int min_of(int a, int b) { return a < b ? a : b; }

__device__ __forceinline__ bool aligned16(const void* pointer) {
  return reinterpret_cast<unsigned long long>(pointer) % 16 == 0;
}

// Copies 8 elements, of which `valid` exist (zeros follow): at once where rows are aligned, else one by one.
template <class T>
__device__ __forceinline__ void load_chunk(unsigned short* shared, const T* from, int valid, bool aligned) {
  if (aligned) {
    cp_async16(shared, from, valid > 0 ? 16 : 0);
    return;
  }
#pragma unroll 1
  for (int i = 0; i < CHUNK; ++i) shared[i] = i < valid ? from[i].bits : 0;
}

// What a tile multiplies: A [rows, depth] by offsets in Shared::row, B [MATS][cols, depth], matrices `apart` elements.
template <class T>
struct Operands {
  const T* a;
  const T* b;
  long long apart;
  int cols;
  int depth;
};

template <class T, int MATS>
__device__ void load_stage(Shared& s, const Operands<T>& of, int step) {
  constexpr int PER_ROW = BK / CHUNK;
  const int stage = step % STAGES, k0 = step * BK;
  const bool aligned = of.depth % CHUNK == 0 && aligned16(of.a) && aligned16(of.b);
  for (int i = threadIdx.x; i < BM * PER_ROW; i += THREADS) {
    const int r = i / PER_ROW, k = i % PER_ROW * CHUNK;
    const long long begin = s.row[r];
    const int valid = begin < 0 ? 0 : of.depth - (k0 + k);
    load_chunk(&s.a[stage][r][k], valid > 0 ? of.a + begin + k0 + k : of.a, valid, aligned);
  }
  for (int i = threadIdx.x; i < MATS * BN * PER_ROW; i += THREADS) {
    const int mat = i / (BN * PER_ROW), c = i / PER_ROW % BN, k = i % PER_ROW * CHUNK;
    const int valid = c < of.cols ? of.depth - (k0 + k) : 0;
    const T* from = of.b + mat * of.apart + static_cast<long long>(c) * of.depth + k0 + k;
    load_chunk(&s.b[stage][mat][c][k], valid > 0 ? from : of.b, valid, aligned);
  }
}

__device__ __forceinline__ unsigned pair_at(const unsigned short* shared) {
  return *reinterpret_cast<const unsigned*>(shared);
}

// Adds one step's products to the sums of this warp.
template <class T, int MATS>
__device__ void multiply_stage(const Shared& s, float (&sum)[MATS][MT][NT][4], int stage) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, pair = lane % 4 * 2;
  const int row0 = warp / MOE_WARPS_N * WARP_ROWS, col0 = warp % MOE_WARPS_N * WARP_COLS;
#pragma unroll
  for (int k = 0; k < BK; k += 16) {
    unsigned a[MT][4];
#pragma unroll
    for (int m = 0; m < MT; ++m) {
      const unsigned short* upper = &s.a[stage][row0 + 16 * m + group][k + pair];
      const unsigned short* lower = upper + 8 * LD;
      a[m][0] = pair_at(upper), a[m][1] = pair_at(lower), a[m][2] = pair_at(upper + 8), a[m][3] = pair_at(lower + 8);
    }
#pragma unroll
    for (int mat = 0; mat < MATS; ++mat) {
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        const unsigned short* column = &s.b[stage][mat][col0 + 8 * n + group][k + pair];
        const unsigned b[2] = {pair_at(column), pair_at(column + 8)};
#pragma unroll
        for (int m = 0; m < MT; ++m) mma(sum[mat][m][n], a[m], b, T());
      }
    }
  }
}

// sum[mat] = A B[mat]^T of a tile. Shared::row must be written and a barrier passed; ends with one, so that the stages
// and Shared::row may be written anew.
template <class T, int MATS>
__device__ void multiply(Shared& s, float (&sum)[MATS][MT][NT][4], const Operands<T>& of) {
  const int steps = ceil_div(of.depth, BK);
#pragma unroll
  for (int i = 0; i < MATS * MT * NT; ++i) {
    float(&four)[4] = sum[i / (MT * NT)][i / NT % MT][i % NT];
    four[0] = four[1] = four[2] = four[3] = 0.0f;
  }
#pragma unroll 1
  for (int step = 0; step < STAGES - 1; ++step) {
    if (step < steps) load_stage<T, MATS>(s, of, step);
    cp_async_commit();
  }
  for (int step = 0; step < steps; ++step) {
    cp_async_wait<STAGES - 2>();
    __syncthreads();  // this step's copies of all threads are here, and nobody reads the stage that is loaded next
    if (step + STAGES - 1 < steps) load_stage<T, MATS>(s, of, step + STAGES - 1);
    cp_async_commit();  // an empty group keeps the count of groups equal to that of steps
    multiply_stage<T, MATS>(s, sum, step % STAGES);
  }
  __syncthreads();  // the stages are free again
}

// Calls use(row, col, m, n, i) for each sum [m][n][i] of this thread that lies within rows x cols of the tile.
template <class Use>
__device__ __forceinline__ void for_each_sum(int rows, int cols, Use use) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int row0 = warp / MOE_WARPS_N * WARP_ROWS + lane / 4, col0 = warp % MOE_WARPS_N * WARP_COLS + lane % 4 * 2;
#pragma unroll
  for (int m = 0; m < MT; ++m) {
#pragma unroll
    for (int n = 0; n < NT; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = row0 + 16 * m + i / 2 * 8, col = col0 + 8 * n + i % 2;
        if (row < rows && col < cols) use(row, col, m, n, i);
      }
    }
  }
}
