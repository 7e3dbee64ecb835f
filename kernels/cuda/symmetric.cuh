// The layer over several devices (expert parallelism): experts are spread over them in order, tokens stay where they are,
// rows travel by one-sided writes into peers' memory, in one launch per device. The launches of all devices must run at
// the same time, and each device must make the same number of launches.
#pragma once
#include "moe.cuh"

// Every device owns one buffer [peers][rounds][stages][experts][capacity][hidden] (after FlashMoE, arXiv 2506.04667).
// Cell (p, ..) of device d is written by p alone: with rows of p's tokens in round 0, with results for d's tokens in
// round 1; in stage 0 where p is d itself, in stage 1 where it is another. Slot i is the i-th row of one packet. So no
// two writers ever share a cell, whatever the routing, and nothing is locked.
struct SymmetricShape {
  int peers, experts, capacity, hidden;

  static constexpr int ROUNDS = 2, STAGES_OF_ROUND = 2;

  __device__ long long offset(int peer, int round, int stage, int expert, int slot) const {
    const long long cell = ((static_cast<long long>(peer) * ROUNDS + round) * STAGES_OF_ROUND + stage) * experts + expert;
    return (cell * capacity + slot) * hidden;
  }
};

// One device's arguments. `layer.experts` counts those of all devices; gate_up and down hold its own, `experts` many.
// `capacity` rows of a packet are the most that a device may send to one expert. The counters of `flags` [round][peer]
// [expert] are written by peers and never reset: round 0 holds the launch and the number of rows, round 1 counts tiles.
template <class T>
struct Symmetric {
  Layer<T> layer;
  unsigned long long* finished;        // [peers][experts][row blocks] gate_up tiles of this launch; then its packets sent
  unsigned long long* expected;        // [peers][experts] tiles that round 1 has counted when all are here
  T* const* buffers;                   // by device
  unsigned long long* const* flags;    // by device
  int ranks, rank, capacity, experts;  // `experts` of this device

  __device__ SymmetricShape shape() const { return {ranks, experts, capacity, layer.hidden}; }
  __device__ int blocks() const { return ceil_div(capacity, BM); }
  __device__ int units() const { return ranks * experts * blocks(); }
  __device__ int hidden_tiles() const { return ceil_div(layer.hidden, BN); }
  __device__ unsigned long long* flag(int owner, int round, int peer, int expert) const {
    return flags[owner] + (round * ranks + peer) * experts + expert;
  }
  // Where `writer`'s packet for an expert lies in `owner`'s memory.
  __device__ T* packet(int owner, int round, int writer, int expert) const {
    return buffers[owner] + shape().offset(writer, round, owner == writer ? 0 : 1, expert, 0);
  }
};

// Copies this device's rows for one expert of `peer` to where it reads them, and raises the flag.
template <class T>
__device__ void send_rows(const Symmetric<T>& of, int peer, int expert, unsigned long long epoch) {
  const Layer<T>& layer = of.layer;
  const int everywhere = peer * of.experts + expert, first = layer.offsets_E1[everywhere];
  const int rows = layer.offsets_E1[everywhere + 1] - first;
  T* to = of.packet(peer, 0, of.rank, expert);
  for (int r = 0; r < rows; ++r) {
    const T* from = layer.x_TH + layer.token_N[first + r] * layer.hidden;
    for (int h = threadIdx.x; h < layer.hidden; h += THREADS) to[static_cast<long long>(r) * layer.hidden + h] = from[h];
  }
  __syncthreads();  // all rows are written
  if (threadIdx.x == 0) {
    of.expected[everywhere] += static_cast<unsigned long long>(ceil_div(rows, BM)) * of.hidden_tiles();
    store_release_system(of.flag(peer, 0, of.rank, expert), epoch << 32 | static_cast<unsigned>(rows));
    add_release_system(of.finished + of.units(), 1);
  }
}

__device__ __forceinline__ unsigned long long wait_for(const unsigned long long* flag, unsigned long long least) {
  unsigned long long found = load_acquire_system(flag);
  while (found < least) {
    backoff();
    found = load_acquire_system(flag);
  }
  return found;
}

// Waits for a packet and returns to all threads how many of its rows a row block has. A flag of a later launch says that
// its sender has got all it waits for, so that this block had no row in this one.
template <class T>
__device__ int rows_of_block(Shared& s, const Symmetric<T>& of, int peer, int expert, int block, unsigned long long epoch) {
  if (threadIdx.x == 0) {
    const unsigned long long found = wait_for(of.flag(of.rank, 0, peer, expert), epoch << 32);
    s.rows = found >> 32 == epoch ? static_cast<int>(found & 0xffffffffu) - block * BM : 0;
  }
  __syncthreads();
  return min_of(BM, s.rows);
}

template <class T>
__device__ void name_rows(Shared& s, int rows, int width) {
  for (int r = threadIdx.x; r < BM; r += THREADS) s.row[r] = r < rows ? static_cast<long long>(r) * width : -1;
  __syncthreads();
}

// A tile of one packet's gate and up; `unit` numbers (peer, expert, row block).
template <class T>
__device__ void packet_hidden(Shared& s, const Symmetric<T>& of, int unit, int tile, unsigned long long epoch) {
  const Layer<T>& layer = of.layer;
  const int block = unit % of.blocks(), expert = unit / of.blocks() % of.experts, peer = unit / of.blocks() / of.experts;
  const int rows = rows_of_block(s, of, peer, expert, block, epoch);
  if (rows <= 0) return;
  name_rows<T>(s, rows, layer.hidden);
  const long long matrix = static_cast<long long>(layer.gated ? 2 : 1) * layer.width * layer.hidden;
  const T* a = of.packet(of.rank, 0, peer, expert) + static_cast<long long>(block) * BM * layer.hidden;
  hidden_tile(s, a, layer.gate_up + expert * matrix, layer.hidden_NF + static_cast<long long>(unit) * BM * layer.width, rows,
              tile * BN, layer.width, layer.hidden, layer.activation, layer.gated);
  if (threadIdx.x == 0) add_release_system(of.finished + unit, 1);
}

// A tile of one packet's results, written to where the tokens live.
template <class T>
__device__ void packet_down(Shared& s, const Symmetric<T>& of, int unit, int tile, unsigned long long epoch) {
  const Layer<T>& layer = of.layer;
  const int block = unit % of.blocks(), expert = unit / of.blocks() % of.experts, peer = unit / of.blocks() / of.experts;
  const int rows = rows_of_block(s, of, peer, expert, block, epoch);
  if (rows <= 0) return;
  if (threadIdx.x == 0) wait_for(of.finished + unit, ceil_div(layer.width, BN));
  name_rows<T>(s, rows, layer.width);
  const int h0 = tile * BN, cols = min_of(BN, layer.hidden - h0);
  const T* a = layer.hidden_NF + static_cast<long long>(unit) * BM * layer.width;
  const T* weights = layer.down_EHF + (static_cast<long long>(expert) * layer.hidden + h0) * layer.width;
  T* to = of.packet(peer, 1, of.rank, expert) + static_cast<long long>(block) * BM * layer.hidden + h0;
  float sum[1][MT][NT][4];
  multiply<T, 1>(s, sum, Operands<T>{a, weights, 0, cols, layer.width});
  for_each_sum(rows, cols, [&](int row, int col, int m, int n, int i) {
    to[static_cast<long long>(row) * layer.hidden + col] = rounded(sum[0][m][n][i], T());
  });
  __syncthreads();
  if (threadIdx.x == 0) add_release_system(of.flag(peer, 1, of.rank, expert), 1);
}

// Waits for all results, then adds up each token's rows in rising order of assignments.
template <class T>
__device__ void combine_packets(const Symmetric<T>& of, int tile, int packets) {
  const Layer<T>& layer = of.layer;
  find_assignments(layer, tile);
  if (threadIdx.x == 0) {
    wait_for(of.finished + of.units(), packets);
    for (int i = 0; i < packets; ++i) wait_for(of.flag(of.rank, 1, i / of.experts, i % of.experts), of.expected[i]);
  }
  __syncthreads();
  const int end = min_of((tile + 1) * TOKEN_TILE, layer.tokens);
  for (int token = tile * TOKEN_TILE; token < end; ++token) {
    for (int h = threadIdx.x; h < layer.hidden; h += THREADS) {
      float sum = 0.0f;
      for (int i = layer.spans_T2[2 * token]; i < layer.spans_T2[2 * token + 1]; ++i) {
        const int assignment = layer.order_N[i];
        int expert = 0;
        while (layer.offsets_E1[expert + 1] <= assignment) ++expert;
        const int slot = assignment - layer.offsets_E1[expert];
        const T* rows = of.packet(of.rank, 1, expert / of.experts, expert % of.experts);
        sum += layer.weight_N[assignment] * widened(rows[static_cast<long long>(slot) * layer.hidden + h]);
      }
      layer.out_TH[static_cast<long long>(token) * layer.hidden + h] = rounded(sum, T());
    }
  }
}

// Tasks by ticket: all sends, all gate_up tiles, all down tiles, all combines. A task waits for tasks of lower tickets
// (its own device's, or any device's of an earlier phase), which run already: so it ends wherever all devices run.
template <class T>
__device__ void symmetric(const Symmetric<T>& of) {
  DYN_SMEM(memory);
  Shared& s = *reinterpret_cast<Shared*>(memory);
  const unsigned long long epoch = static_cast<unsigned>(of.layer.state[EPOCH]) + 1ull;
  const int packets = of.ranks * of.experts;
  const int width_tiles = ceil_div(of.layer.width, BN), hidden_tiles = of.hidden_tiles();
  const int downs = packets + of.units() * width_tiles, combines = downs + of.units() * hidden_tiles;
  for (;;) {
    if (threadIdx.x == 0) s.task = fetch_add(of.layer.state + HEAD, 1);
    __syncthreads();
    const int task = s.task;  // every task passes a barrier before thread 0 takes the next one
    if (task >= combines + of.layer.token_tiles()) break;
    if (task < packets) {
      send_rows(of, (of.rank + task / of.experts) % of.ranks, task % of.experts, epoch);
    } else if (task < downs) {
      packet_hidden(s, of, (task - packets) / width_tiles, (task - packets) % width_tiles, epoch);
    } else if (task < combines) {
      packet_down(s, of, (task - downs) / hidden_tiles, (task - downs) % hidden_tiles, epoch);
    } else {
      combine_packets(of, task - combines, packets);
    }
  }
  if (leave(of.layer.state)) {
    for (int i = 0; i <= of.units(); ++i) of.finished[i] = 0;
  }
}

#define MOE_SYMMETRIC_ARGUMENTS(T)                                                                                   \
  const T *x_TH, const T *gate_up, const T *down_EHF, const long long *token_N, const int *offsets_E1,               \
      const float *weight_N, T *hidden_NF, int *order_N, int *spans_T2, int *state, unsigned long long *finished,     \
      unsigned long long *expected, T *const *buffers, unsigned long long *const *flags, T *out_TH, int tokens,       \
      int experts, int hidden, int width, int activation, int gated, int ranks, int rank, int capacity
#define MOE_SYMMETRIC(T)                                                                                             \
  Symmetric<T> {                                                                                                     \
    {x_TH, gate_up, down_EHF, token_N, offsets_E1, weight_N, hidden_NF, nullptr, order_N, spans_T2, state, nullptr,  \
     out_TH, tokens, experts, hidden, width, activation, gated, 0},                                                  \
        finished, expected, buffers, flags, ranks, rank, capacity, experts / ranks                                   \
  }

#ifndef MOE_ONLY_FLOAT16
extern "C" __global__ void __launch_bounds__(THREADS) moe_symmetric_bfloat16(MOE_SYMMETRIC_ARGUMENTS(Bf16)) {
  symmetric(MOE_SYMMETRIC(Bf16));
}
#endif
#ifndef MOE_ONLY_BFLOAT16
extern "C" __global__ void __launch_bounds__(THREADS) moe_symmetric_float16(MOE_SYMMETRIC_ARGUMENTS(F16)) {
  symmetric(MOE_SYMMETRIC(F16));
}
#endif
