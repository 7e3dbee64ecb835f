// A Mixture-of-Experts layer from sorted assignments to outputs: in one persistent launch, or in two plain ones.
//
// Persistent (after FlashMoE, arXiv 2506.04667: one kernel, tile tasks, dependency counters): every block takes tickets
// from one counter. The first tickets are the tasks that wait for nothing (gate and up, dispatch), by arithmetic; the
// later ones wait for a slot of the queue, which fills as counters reach their ends:
//   all gate_up tiles of a row block -> its down tiles; all rows of a token tile, and its dispatch -> its combine.
// A ticket waits only for tasks that lower tickets hold, and those are running: no block need be resident for another,
// and any number of blocks >= 1 ends. There is no scheduler block: whoever finishes a dependency pushes what it frees.
// The queue's slots carry the number of the launch, so that none of an earlier launch is ever taken for a new one; the
// last block to leave resets the counters. One launch at a time may use one `state`.
#pragma once
#include "layer.cuh"

template <class T>
struct Tasks {
  int gate_up, ready, down, all, width_tiles, hidden_tiles;
  unsigned long long tag;

  __device__ Tasks(const Shared& s, const Layer<T>& of)
      : width_tiles(ceil_div(of.width, BN)), hidden_tiles(ceil_div(of.hidden, BN)) {
    const int blocks = s.starts[of.experts];
    gate_up = blocks * width_tiles;
    ready = gate_up + of.token_tiles();
    down = blocks * hidden_tiles;
    all = ready + down + of.token_tiles();
    tag = static_cast<unsigned long long>(of.state[EPOCH] + 1) << 32;
  }
};

// Returns the next task, or -1: tasks below `ready` are their own tickets, others are numbered from there on.
template <class T>
__device__ int next_task(const Layer<T>& of, const Tasks<T>& tasks) {
  const int ticket = fetch_add(of.state + HEAD, 1);
  if (ticket < tasks.ready) return ticket;
  if (ticket >= tasks.all) return -1;
  const unsigned long long* slot = of.slots + (ticket - tasks.ready);
  unsigned long long found = load_acquire(slot);
  while ((found >> 32) != (tasks.tag >> 32)) {
    backoff();
    found = load_acquire(slot);  // again
  }
  return tasks.ready + static_cast<int>(found & 0xffffffffu);
}

template <class T>
__device__ void push(const Layer<T>& of, const Tasks<T>& tasks, int first, int count) {
  const int at = fetch_add(of.state + TAIL, count);
#pragma unroll 1
  for (int i = 0; i < count; ++i) store_release(of.slots + at + i, tasks.tag | static_cast<unsigned>(first + i));
}

template <class T>
__device__ void run_gate_up(Shared& s, const Layer<T>& of, const Tasks<T>& tasks, int task) {
  const int block = task / tasks.width_tiles;
  gate_up_tile(s, of, block, task % tasks.width_tiles);
  if (threadIdx.x == 0 && fetch_add(of.finished() + block, 1) == tasks.width_tiles - 1) {
    of.finished()[block] = 0;
    push(of, tasks, block * tasks.hidden_tiles, tasks.hidden_tiles);
  }
}

template <class T>
__device__ void run_down(Shared& s, const Layer<T>& of, const Tasks<T>& tasks, int task) {
  down_tile(s, of, task / tasks.hidden_tiles, task % tasks.hidden_tiles);
  if (threadIdx.x == 0) {
    for (int i = 0; i < s.num_released; ++i) push(of, tasks, tasks.down + s.released[i], 1);
  }
}

// Returns to thread 0 of the last block to leave that it is the last, with the counters ready for the next launch.
__device__ __forceinline__ bool leave(int* state) {
  if (threadIdx.x != 0 || fetch_add(state + EXITED, 1) != static_cast<int>(gridDim.x) - 1) return false;
  state[HEAD] = state[TAIL] = state[EXITED] = 0;
  state[EPOCH] += 1;
  return true;
}

template <class T>
__device__ void persistent(const Layer<T>& of) {
  DYN_SMEM(memory);
  Shared& s = *reinterpret_cast<Shared*>(memory);
  find_row_blocks(s, of);
  const Tasks<T> tasks(s, of);
  for (;;) {
    if (threadIdx.x == 0) s.task = next_task(of, tasks);
    __syncthreads();
    const int task = s.task;  // every task passes a barrier before thread 0 takes the next one
    if (task < 0) break;
    if (task < tasks.gate_up) {
      run_gate_up(s, of, tasks, task);
    } else if (task < tasks.ready) {
      if (dispatch_tile(of, task - tasks.gate_up)) push(of, tasks, tasks.down + task - tasks.gate_up, 1);
    } else if (task < tasks.ready + tasks.down) {
      run_down(s, of, tasks, task - tasks.ready);
    } else {
      combine_tile(of, task - tasks.ready - tasks.down);
    }
  }
  leave(of.state);
}

// Dispatch and gate_up tiles, one a block; `gridDim.x` is the most that any routing needs. Tokens of nobody end here.
template <class T>
__device__ void plain_gate_up(const Layer<T>& of) {
  DYN_SMEM(memory);
  Shared& s = *reinterpret_cast<Shared*>(memory);
  const int tile = static_cast<int>(blockIdx.x) - of.token_tiles(), tiles = ceil_div(of.width, BN);
  if (tile < 0) {
    if (threadIdx.x == 0) s.task = 0;
    __syncthreads();
    if (dispatch_tile(of, blockIdx.x)) s.task = 1;
    __syncthreads();
    if (s.task) combine_tile(of, blockIdx.x);
    return;
  }
  find_row_blocks(s, of);
  if (tile < s.starts[of.experts] * tiles) gate_up_tile(s, of, tile / tiles, tile % tiles);
}

// Down tiles, one a block; whoever writes the last row of a token tile combines it.
template <class T>
__device__ void plain_down(const Layer<T>& of) {
  DYN_SMEM(memory);
  Shared& s = *reinterpret_cast<Shared*>(memory);
  const int tile = blockIdx.x, tiles = ceil_div(of.hidden, BN);
  find_row_blocks(s, of);
  if (tile >= s.starts[of.experts] * tiles) return;
  down_tile(s, of, tile / tiles, tile % tiles);
  for (int i = 0; i < s.num_released; ++i) combine_tile(of, s.released[i]);
}

#define MOE_ARGUMENTS(T)                                                                                            \
  const T *x_TH, const T *gate_up, const T *down_EHF, const long long *token_N, const int *offsets_E1,              \
      const float *weight_N, T *hidden_NF, float *partial, int *order_N, int *spans_T2, int *state,                 \
      unsigned long long *slots, T *out_TH, int tokens, int experts, int hidden, int width, int activation,         \
      int gated, int atomic
#define MOE_LAYER(T)                                                                                                \
  Layer<T> {                                                                                                        \
    x_TH, gate_up, down_EHF, token_N, offsets_E1, weight_N, hidden_NF, partial, order_N, spans_T2, state, slots,    \
        out_TH, tokens, experts, hidden, width, activation, gated, atomic                                           \
  }

// Compiling takes half the time with one dtype alone: MOE_ONLY_BFLOAT16, MOE_ONLY_FLOAT16.
#ifndef MOE_ONLY_FLOAT16
extern "C" __global__ void __launch_bounds__(THREADS) moe_fused_bfloat16(MOE_ARGUMENTS(Bf16)) {
  persistent(MOE_LAYER(Bf16));
}
extern "C" __global__ void __launch_bounds__(THREADS) moe_gate_up_bfloat16(MOE_ARGUMENTS(Bf16)) {
  plain_gate_up(MOE_LAYER(Bf16));
}
extern "C" __global__ void __launch_bounds__(THREADS) moe_down_combine_bfloat16(MOE_ARGUMENTS(Bf16)) {
  plain_down(MOE_LAYER(Bf16));
}
#endif
#ifndef MOE_ONLY_BFLOAT16
extern "C" __global__ void __launch_bounds__(THREADS) moe_fused_float16(MOE_ARGUMENTS(F16)) {
  persistent(MOE_LAYER(F16));
}
extern "C" __global__ void __launch_bounds__(THREADS) moe_gate_up_float16(MOE_ARGUMENTS(F16)) {
  plain_gate_up(MOE_LAYER(F16));
}
extern "C" __global__ void __launch_bounds__(THREADS) moe_down_combine_float16(MOE_ARGUMENTS(F16)) {
  plain_down(MOE_LAYER(F16));
}
#endif
