// Runs the CUDA sources of the folder above on the CPU: one fiber per CUDA thread, blocks of several emulated
// multiprocessors at once. Compiled in place of device.cuh's PTX; hostsim.cpp is the scheduler.
//
// What is written or read in the name of a kernel is written or read here, in the kernel's own translation unit, so that
// sanitizers see it; the scheduler's own state is in hostsim.cpp, which is never instrumented.
#pragma once
#include <math.h>
#include <string.h>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(threads)
#define DYN_SMEM(name) unsigned char* name = sim::shared_memory()
#define __syncthreads() sim::barrier(__FILE__, __LINE__)

namespace sim {

enum Order { FORWARD, REVERSE, RANDOM };

// `late`: asynchronous copies happen when they are waited for, as late as the rules allow; else at once.
// `mutant` is read by sources that tests have edited, and by nothing else.
struct Config {
  int multiprocessors, order, late, mutant;
  unsigned long long seed;
};

// What was counted, by all threads together; `message` says why a launch failed.
struct Report {
  long long launches, blocks, barriers, mma, shuffles, ballots, async_bytes, atomics, switches;
  int failed;
  char message[500];
};

// One kernel of a launch; several (one per emulated device) run at the same time.
struct Grid {
  void (*body)(void** arguments);
  void** arguments;
  int blocks, threads, shared_bytes;
};

void launch(const Grid* grids, int number, const Config& config, Report& report);

struct Index {
  unsigned x;
};
struct Place {
  Index thread, block, block_dim, grid_dim;
};
extern const Place* place;  // of the thread that runs
extern int mutant;

unsigned char* shared_memory();
void barrier(const char* file, int line);
void yield(bool changes);  // another block may go first; `changes`: what follows is no mere look
void back_off();
void count_bytes(int bytes);  // of asynchronous copies
void count_atomic();

enum Collective { SYNC_WARP, SHUFFLE, BALLOT, MMA_BF16, MMA_F16 };
struct Mma {
  float* d;
  const unsigned *a, *b;
};
void collective(Collective kind, unsigned mask, int line, const void* in, void* out);

struct Copy {
  void* to;
  const void* from;
  int bytes;
};
void begin_copy(const Copy& copy);       // later ...
void commit_copies();
const Copy* due_copy(int pending_groups);  // ... the oldest that is due while at most so many groups may be pending
bool copies_are_late();

inline void perform(const Copy& copy) {
  for (int i = 0; i < 4; ++i) {
    static_cast<unsigned*>(copy.to)[i] = copy.bytes ? static_cast<const unsigned*>(copy.from)[i] : 0u;
  }
}

}  // namespace sim

#define threadIdx (sim::place->thread)
#define blockIdx (sim::place->block)
#define blockDim (sim::place->block_dim)
#define gridDim (sim::place->grid_dim)

// --- numbers ---------------------------------------------------------------------------------------------------------

struct Bf16 {
  unsigned short bits;
};
struct F16 {
  unsigned short bits;
};

inline Bf16 rounded(float value, Bf16) {
  unsigned bits;
  memcpy(&bits, &value, 4);
  if (value != value) return {0x7fff};
  return {static_cast<unsigned short>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}
inline F16 rounded(float value, F16) {
  const _Float16 half = static_cast<_Float16>(value);
  F16 made;
  memcpy(&made, &half, 2);
  return made;
}
inline float widened(Bf16 value) {
  const unsigned bits = static_cast<unsigned>(value.bits) << 16;
  float made;
  memcpy(&made, &bits, 4);
  return made;
}
inline float widened(F16 value) {
  _Float16 half;
  memcpy(&half, &value.bits, 2);
  return static_cast<float>(half);
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }

// --- warps -----------------------------------------------------------------------------------------------------------

// Lanes must meet at the same call; that of a caller is told by its line.
inline void __syncwarp(unsigned mask = 0xffffffffu, int line = __builtin_LINE()) {
  sim::collective(sim::SYNC_WARP, mask, line, nullptr, nullptr);
}
inline unsigned __ballot_sync(unsigned mask, bool holds, int line = __builtin_LINE()) {
  const unsigned in = holds;
  unsigned out = 0;
  sim::collective(sim::BALLOT, mask, line, &in, &out);
  return out;
}
inline int __shfl_sync(unsigned mask, int value, int lane, int line = __builtin_LINE()) {
  const int in[2] = {value, lane & 31};
  int out = 0;
  sim::collective(sim::SHUFFLE, mask, line, in, &out);
  return out;
}
inline int __shfl_up_sync(unsigned mask, int value, int step, int line = __builtin_LINE()) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  return __shfl_sync(mask, value, lane < step ? lane : lane - step, line);
}
inline void mma(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], Bf16,
                int line = __builtin_LINE()) {
  const sim::Mma in = {d, a, b};
  sim::collective(sim::MMA_BF16, 0xffffffffu, line, &in, nullptr);
}
inline void mma(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], F16,
                int line = __builtin_LINE()) {
  const sim::Mma in = {d, a, b};
  sim::collective(sim::MMA_F16, 0xffffffffu, line, &in, nullptr);
}

// --- asynchronous copies ---------------------------------------------------------------------------------------------

inline void cp_async16(void* shared, const void* global, int bytes) {
  const sim::Copy copy = {shared, global, bytes};
  sim::count_bytes(bytes);
  if (sim::copies_are_late()) sim::begin_copy(copy);
  else sim::perform(copy);
}
inline void cp_async_commit() { sim::commit_copies(); }
template <int PENDING>
inline void cp_async_wait() {
  while (const sim::Copy* copy = sim::due_copy(PENDING)) sim::perform(*copy);
}

// --- memory that blocks share: the order that each operation asks for, and no more -----------------------------------

inline unsigned long long load_acquire(const unsigned long long* from) {
  sim::yield(false);
  return __atomic_load_n(from, __ATOMIC_ACQUIRE);
}
inline void store_release(unsigned long long* to, unsigned long long value) {
  sim::yield(true);
  __atomic_store_n(to, value, __ATOMIC_RELEASE);
}
inline int fetch_add(int* to, int value) {
  sim::yield(true);
  sim::count_atomic();
  return __atomic_fetch_add(to, value, __ATOMIC_ACQ_REL);
}
inline unsigned long long load_acquire_system(const unsigned long long* from) { return load_acquire(from); }
inline void store_release_system(unsigned long long* to, unsigned long long value) { store_release(to, value); }
inline void add_release_system(unsigned long long* to, unsigned long long value) {
  sim::yield(true);
  sim::count_atomic();
  __atomic_fetch_add(to, value, __ATOMIC_RELEASE);
}
inline void add_float(float* to, float value) {
  sim::count_atomic();
  unsigned before, after, *bits = reinterpret_cast<unsigned*>(to);
  before = __atomic_load_n(bits, __ATOMIC_RELAXED);
  do {
    float sum;
    memcpy(&sum, &before, 4);
    sum += value;
    memcpy(&after, &sum, 4);
  } while (!__atomic_compare_exchange_n(bits, &before, after, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
}
inline int count_shared(int* to) { return __atomic_fetch_add(to, 1, __ATOMIC_RELAXED); }
inline void backoff() { sim::back_off(); }
