// The four tile tasks of a layer: dispatch, gate and up, down, combine. Both variants run these and nothing else.
// T tokens, H hidden, F expert width, E experts, N assignments sorted by expert: expert e owns rows
// [offsets_E1[e], offsets_E1[e + 1]), in blocks of BM that never cross experts.
#pragma once
#include "tile.cuh"

enum Activation { SILU, GELU, RELU };

// Fields of Layer::state, all zero before the first launch; each launch leaves them so that the next can begin.
// Behind them: T / TOKEN_TILE counters of rows that combine waits for, then one counter per row block of finished tiles.
enum State { HEAD, TAIL, EXITED, EPOCH, STATE_FIELDS };

// One layer's arguments. Sizes in elements; `partial` is [N, H], or [T, H] of zeros where `atomic`.
template <class T>
struct Layer {
  const T* x_TH;
  const T* gate_up;  // [E, 2F, H], or [E, F, H] without a gate
  const T* down_EHF;
  const long long* token_N;
  const int* offsets_E1;
  const float* weight_N;
  T* hidden_NF;
  float* partial;
  int* order_N;   // assignments by token, those of a token in rising order
  int* spans_T2;  // [first, end) of each token in order_N
  int* state;
  unsigned long long* slots;
  T* out_TH;
  int tokens, experts, hidden, width, activation, gated, atomic;

  __device__ int assignments() const { return offsets_E1[experts]; }
  __device__ int token_tiles() const { return ceil_div(tokens, TOKEN_TILE); }
  __device__ int* pending() const { return state + STATE_FIELDS; }
  __device__ int* finished() const { return pending() + token_tiles(); }
};

__device__ __forceinline__ float activated(float value, int kind) {
  if (kind == RELU) return value > 0.0f ? value : 0.0f;
  if (kind == GELU) return 0.5f * value * (1.0f + erff(value * 0.70710678118654752f));
  return value / (1.0f + expf(-value));
}

// Writes Shared::starts: the first row block of each expert, and their number behind the last. All threads call it.
template <class T>
__device__ void find_row_blocks(Shared& s, const Layer<T>& of) {
  if (threadIdx.x < 32) {
    const int lane = threadIdx.x;
    int before = 0;
#pragma unroll 1
    for (int first = 0; first < of.experts; first += 32) {
      const int e = first + lane;
      int sum = e < of.experts ? ceil_div(of.offsets_E1[e + 1] - of.offsets_E1[e], BM) : 0;
      for (int step = 1; step < 32; step *= 2) {
        const int left = __shfl_up_sync(0xffffffffu, sum, step);
        if (lane >= step) sum += left;
      }
      if (e < of.experts) s.starts[e + 1] = before + sum;
      before += __shfl_sync(0xffffffffu, sum, 31);
    }
    if (lane == 0) s.starts[0] = 0;
  }
  __syncthreads();
}

// A row block: `rows` assignments from `first` on, all of one expert.
struct RowBlock {
  int expert, first, rows;
};

template <class T>
__device__ RowBlock row_block(const Shared& s, const Layer<T>& of, int block) {
  int low = 0, high = of.experts;  // starts[low] <= block < starts[high]
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (s.starts[middle] <= block) low = middle;
    else high = middle;
  }
  const int first = of.offsets_E1[low] + (block - s.starts[low]) * BM;
  return {low, first, min_of(BM, of.offsets_E1[low + 1] - first)};
}

// hidden[row, f0 ..] = act(gate) * up, or act(up) without a gate, of the rows that Shared::row names; `weights` are one
// expert's. Begins behind a barrier that follows Shared::row, and ends with one.
template <class T>
__device__ void hidden_tile(Shared& s, const T* a, const T* weights, T* hidden, int rows, int f0, int width, int depth,
                            int activation, int gated) {
  const Operands<T> of = {a, weights + static_cast<long long>(f0) * depth, static_cast<long long>(width) * depth,
                          min_of(BN, width - f0), depth};
  if (gated) {
    float sum[2][MT][NT][4];
    multiply<T, 2>(s, sum, of);
    for_each_sum(rows, of.cols, [&](int row, int col, int m, int n, int i) {
      const float value = activated(sum[0][m][n][i], activation) * sum[1][m][n][i];
      hidden[static_cast<long long>(row) * width + f0 + col] = rounded(value, T());
    });
  } else {
    float sum[1][MT][NT][4];
    multiply<T, 1>(s, sum, of);
    for_each_sum(rows, of.cols, [&](int row, int col, int m, int n, int i) {
      hidden[static_cast<long long>(row) * width + f0 + col] = rounded(activated(sum[0][m][n][i], activation), T());
    });
  }
  __syncthreads();
}

template <class T>
__device__ void gate_up_tile(Shared& s, const Layer<T>& of, int block, int tile) {
  const RowBlock mine = row_block(s, of, block);
  for (int r = threadIdx.x; r < BM; r += THREADS) {
    s.row[r] = r < mine.rows ? of.token_N[mine.first + r] * of.hidden : -1;
  }
  __syncthreads();
  const long long matrix = static_cast<long long>(of.gated ? 2 : 1) * of.width * of.hidden;
  hidden_tile(s, of.x_TH, of.gate_up + mine.expert * matrix, of.hidden_NF + static_cast<long long>(mine.first) * of.width,
              mine.rows, tile * BN, of.width, of.hidden, of.activation, of.gated);
}

// partial += or = weight * (hidden down^T) of one tile; then counts its rows off, and lists in Shared::released the token
// tiles that have all of theirs. Ends with a barrier.
template <class T>
__device__ void down_tile(Shared& s, const Layer<T>& of, int block, int tile) {
  const RowBlock mine = row_block(s, of, block);
  for (int r = threadIdx.x; r < BM; r += THREADS) {
    s.row[r] = r < mine.rows ? static_cast<long long>(mine.first + r) * of.width : -1;
  }
  if (threadIdx.x == 0) s.num_released = 0;
  __syncthreads();
  const int h0 = tile * BN, cols = min_of(BN, of.hidden - h0);
  const T* weights = of.down_EHF + (static_cast<long long>(mine.expert) * of.hidden + h0) * of.width;
  float sum[1][MT][NT][4];
  multiply<T, 1>(s, sum, Operands<T>{of.hidden_NF, weights, 0, cols, of.width});
  for_each_sum(mine.rows, cols, [&](int row, int col, int m, int n, int i) {
    const int assignment = mine.first + row;
    const float value = of.weight_N[assignment] * sum[0][m][n][i];
    if (of.atomic) {
      add_float(of.partial + of.token_N[assignment] * of.hidden + h0 + col, value);
    } else {
      of.partial[static_cast<long long>(assignment) * of.hidden + h0 + col] = value;
    }
  });
  __syncthreads();  // so that what one thread counts off is written by all
  for (int r = threadIdx.x; r < mine.rows; r += THREADS) {
    const int token_tile = static_cast<int>(of.token_N[mine.first + r]) / TOKEN_TILE;
    if (fetch_add(of.pending() + token_tile, -1) == 1) s.released[count_shared(&s.num_released)] = token_tile;
  }
  __syncthreads();
}

// Finds the assignments of TOKEN_TILE tokens, four by each warp: reads all of token_N twice. Ends with a barrier.
template <class T>
__device__ void find_assignments(const Layer<T>& of, int tile) {
  const int lane = threadIdx.x % 32, first = tile * TOKEN_TILE + threadIdx.x / 32 * 4, all = of.assignments();
  int before = 0, count[4] = {0, 0, 0, 0};
#pragma unroll 1
  for (int n0 = 0; n0 < all; n0 += 32) {
    const long long token = n0 + lane < all ? of.token_N[n0 + lane] : of.tokens;
    before += __popc(__ballot_sync(0xffffffffu, token < first));
#pragma unroll
    for (int i = 0; i < 4; ++i) count[i] += __popc(__ballot_sync(0xffffffffu, token == first + i));
  }
  int end[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (lane == 0 && first + i < of.tokens) {
      of.spans_T2[2 * (first + i)] = before;
      of.spans_T2[2 * (first + i) + 1] = before + count[i];
    }
    end[i] = before;
    before += count[i];
  }
#pragma unroll 1
  for (int n0 = 0; n0 < all; n0 += 32) {
    const long long token = n0 + lane < all ? of.token_N[n0 + lane] : of.tokens;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool mine = first + i < of.tokens && token == first + i;
      const unsigned found = __ballot_sync(0xffffffffu, mine);
      if (mine) of.order_N[end[i] + __popc(found & ((1u << lane) - 1u))] = n0 + lane;
      end[i] += __popc(found);
    }
  }
  __syncthreads();
}

// Finds the tile's assignments and says how many rows combine waits for. Returns to thread 0 whether none is left to
// wait for.
template <class T>
__device__ bool dispatch_tile(const Layer<T>& of, int tile) {
  find_assignments(of, tile);
  if (threadIdx.x != 0) return false;
  const int last = min_of((tile + 1) * TOKEN_TILE, of.tokens) - 1;
  const int rows = of.spans_T2[2 * last + 1] - of.spans_T2[2 * tile * TOKEN_TILE];
  const int waits = rows * ceil_div(of.hidden, BN);
  return fetch_add(of.pending() + tile, waits) + waits == 0;
}

// out = the sum of each token's rows in rising order of assignments, or what the atomic sums hold (zero again behind it).
template <class T>
__device__ void combine_tile(const Layer<T>& of, int tile) {
  const int end = min_of((tile + 1) * TOKEN_TILE, of.tokens);
  for (int token = tile * TOKEN_TILE; token < end; ++token) {
    const long long row = static_cast<long long>(token) * of.hidden;
    const int from = of.spans_T2[2 * token], to = of.spans_T2[2 * token + 1];
    for (int h = threadIdx.x; h < of.hidden; h += THREADS) {
      float sum = 0.0f;
      if (of.atomic) {
        sum = of.partial[row + h];
        of.partial[row + h] = 0.0f;
      } else {
        for (int i = from; i < to; ++i) sum += of.partial[static_cast<long long>(of.order_N[i]) * of.hidden + h];
      }
      of.out_TH[row + h] = rounded(sum, T());
    }
  }
  __syncthreads();
}
