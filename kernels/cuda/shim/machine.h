// What the scheduler knows: threads, warps, blocks, and the machine that runs them.
#pragma once
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>

#include <deque>
#include <memory>
#include <vector>

#include "fiber.h"
#include "hostsim.h"

namespace sim {
namespace {

constexpr size_t STACK_BYTES = 256 * 1024;
constexpr int MOST_COPIES = 256, MOST_THREADS = 1024;
constexpr long long MOST_SWITCHES = 4000000000LL;

enum State { READY, YIELDED, AT_BARRIER, IN_WARP, DONE };

struct Block;

struct Thread {
  Fiber fiber;
  Place place;
  Block* block = nullptr;
  State state = READY;
  Copy copies[MOST_COPIES];
  int copies_begun = 0, copies_done = 0;
  std::deque<int> groups;  // how many copies had begun at each commit that is pending
};

struct Warp {
  unsigned arrived = 0, mask = 0;
  Collective kind = SYNC_WARP;
  int line = 0;
  const void* in[32];
  void* out[32];
  char order[2] = {};  // stand for the order that __syncwarp gives, to ThreadSanitizer
  int generation = 0;
};

struct Block {
  const Grid* grid = nullptr;
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<Warp> warps;
  uint64_t ready[MOST_THREADS / 64] = {};
  unsigned char* shared = nullptr;
  int live = 0, waiting = 0, yielded = 0, generation = 0;
  const char* file = nullptr;
  int line = 0;
  char order[2] = {}, start = 0;
};

struct Machine {
  Config config;
  Report* report;
  std::vector<std::unique_ptr<Block>> blocks;  // that run now
  std::vector<std::unique_ptr<Thread>> spare, ended;
  std::vector<unsigned char*> freed_later;
  std::vector<int> next_block;  // of each grid
  Fiber main;
  Thread* running = nullptr;
  bool moves_on = false;
  long long idle = 0;
  char end = 0;
  uint64_t random = 0;

  unsigned draw(unsigned below) {
    random ^= random << 13, random ^= random >> 7, random ^= random << 17;
    return static_cast<unsigned>(random >> 33) % below;
  }
};

Machine* machine = nullptr;

void mark(Block& block, int thread, bool ready) {
  const uint64_t bit = uint64_t(1) << (thread % 64);
  if (ready) block.ready[thread / 64] |= bit;
  else block.ready[thread / 64] &= ~bit;
}

void to_main() { switch_fiber(machine->running->fiber, machine->main); }

void wait_as(State state) {
  Thread& me = *machine->running;
  me.state = state;
  mark(*me.block, me.place.thread.x, false);
  to_main();
}

void wake(Thread& thread) {
  thread.state = READY;
  mark(*thread.block, thread.place.thread.x, true);
}

void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));
void fail(const char* format, ...) {
  Report& report = *machine->report;
  if (!report.failed) {
    va_list values;
    va_start(values, format);
    vsnprintf(report.message, sizeof report.message, format, values);
    va_end(values);
  }
  report.failed = 1;
}

}  // namespace
}  // namespace sim
