// The scheduler of hostsim.h: fibers, barriers, warps, blocks. Never instrumented; it tells sanitizers of its switches
// (SIM_ASAN, SIM_TSAN) and ThreadSanitizer of the only orders that CUDA gives: barriers and __syncwarp. Shuffles,
// ballots and mma order no memory.
#include <stdlib.h>

#include "machine.h"
#include "warp.h"

namespace sim {

const Place* place = nullptr;
int mutant = 0;

namespace {

// --- barriers --------------------------------------------------------------------------------------------------------

void open_barrier_if_complete(Block& block) {
  if (!block.waiting || block.waiting < block.live) return;
  block.waiting = 0;
  ++block.generation;
  ++machine->report->barriers;
  machine->idle = 0;
  for (auto& thread : block.threads) {
    if (thread->state == AT_BARRIER) wake(*thread);
  }
}

// --- threads and blocks ----------------------------------------------------------------------------------------------

void thread_main() {
  {
    Thread& me = *machine->running;
    tsan_acquire(&me.block->start);
    me.block->grid->body(me.block->grid->arguments);
    tsan_release(&machine->end);
    Block& block = *me.block;
    me.state = DONE;
    mark(block, me.place.thread.x, false);
    --block.live;
    machine->idle = 0;
    open_barrier_if_complete(block);
  }
  leave_fiber(machine->running->fiber, machine->main);
}

std::unique_ptr<Thread> spare_thread() {
  if (machine->spare.empty()) {
    auto made = std::make_unique<Thread>();
    allocate_stack(made->fiber, STACK_BYTES);
    return made;
  }
  auto taken = std::move(machine->spare.back());
  machine->spare.pop_back();
  return taken;
}

std::unique_ptr<Block> begin_block(const Grid& grid, int index) {
  auto block = std::make_unique<Block>();
  block->grid = &grid;
  block->live = grid.threads;
  block->warps.resize((grid.threads + 31) / 32);
  block->shared = static_cast<unsigned char*>(malloc(grid.shared_bytes));
  memset(block->shared, 0xff, grid.shared_bytes);  // NaN, in every format
  tsan_release(&block->start);
  for (int i = 0; i < grid.threads; ++i) {
    auto thread = spare_thread();
    thread->block = block.get();
    thread->state = READY;
    thread->copies_begun = thread->copies_done = 0;
    thread->groups.clear();
    thread->place = {{unsigned(i)}, {unsigned(index)}, {unsigned(grid.threads)}, {unsigned(grid.blocks)}};
    begin_fiber(thread->fiber, thread_main);
    mark(*block, i, true);
    block->threads.push_back(std::move(thread));
  }
  ++machine->report->blocks;
  return block;
}

// ThreadSanitizer knows of no order between a block's end and what comes next on its multiprocessor, and must not be
// told of any: so that it sees no race where memory is used again, none is until the launch has ended.
void end_block(Block& block) {
  for (auto& thread : block.threads) {
    end_fiber(thread->fiber);
    if (TSAN) free_stack(thread->fiber, STACK_BYTES);
    (TSAN ? machine->ended : machine->spare).push_back(std::move(thread));
  }
  if (TSAN) machine->freed_later.push_back(block.shared);
  else free(block.shared);
}

bool has_ready(const Block& block) {
  for (uint64_t word : block.ready) {
    if (word) return true;
  }
  return false;
}

// Yielded threads are ready again once nobody else of their block is.
bool can_run(Block& block) {
  if (has_ready(block)) return true;
  if (!block.yielded) return false;
  block.yielded = 0;
  for (auto& thread : block.threads) {
    if (thread->state == YIELDED) wake(*thread);
  }
  return true;
}

Thread& pick_thread(Block& block) {
  const int order = machine->config.order, count = int(block.threads.size());
  const int start = order == RANDOM ? int(machine->draw(count)) : order == REVERSE ? count - 1 : 0;
  const int step = order == REVERSE ? count - 1 : 1;
  int at = start;
  while (!(block.ready[at / 64] >> (at % 64) & 1u)) at = (at + step) % count;
  return *block.threads[at];
}

// The block to go on with: the same until it yields or waits, then the next (or any, in random order) that can run.
int pick_block(int current) {
  Machine& m = *machine;
  const int count = int(m.blocks.size());
  if (!m.moves_on && current < count && has_ready(*m.blocks[current])) return current;
  m.moves_on = false;
  const int step = m.config.order == REVERSE ? count - 1 : 1;
  int at = m.config.order == RANDOM ? int(m.draw(count)) : (current + step) % count;
  for (int tried = 0; tried < count; ++tried, at = (at + step) % count) {
    if (can_run(*m.blocks[at])) return at;
  }
  return -1;
}

void tell_deadlock(const char* why) {
  const Block& block = *machine->blocks[0];
  int in_warp = 0;
  for (auto& thread : block.threads) in_warp += thread->state == IN_WARP;
  fail("deadlock (%s): of %d live threads of a block %d wait at a barrier and %d for their warp", why, block.live,
       block.waiting, in_warp);
}

// Takes the next block of a grid whose emulated multiprocessors are not all in use.
void refill(const Grid* grids, int number) {
  Machine& m = *machine;
  for (int g = 0; g < number; ++g) {
    int resident = 0;
    for (auto& block : m.blocks) resident += block->grid == &grids[g];
    for (; resident < m.config.multiprocessors && m.next_block[g] < grids[g].blocks; ++resident) {
      m.blocks.push_back(begin_block(grids[g], m.next_block[g]++));
    }
  }
}

void run(const Grid* grids, int number) {
  Machine& m = *machine;
  refill(grids, number);
  int current = 0;
  while (!m.blocks.empty() && !m.report->failed) {
    current = pick_block(current);
    if (current < 0) return tell_deadlock("nobody can go on");
    if (m.idle > 2000 + 200 * (long long)m.blocks.size()) return tell_deadlock("all who can go on wait for a flag");
    if (++m.report->switches > MOST_SWITCHES) return fail("the kernel does not end");
    m.running = &pick_thread(*m.blocks[current]);
    place = &m.running->place;
    switch_fiber(m.main, m.running->fiber);
    if (m.blocks[current]->live == 0) {
      end_block(*m.blocks[current]);
      m.blocks.erase(m.blocks.begin() + current);
      refill(grids, number);
      current = 0;
    }
  }
}

}  // namespace

// --- what kernels call -----------------------------------------------------------------------------------------------

unsigned char* shared_memory() { return machine->running->block->shared; }
void count_bytes(int bytes) { machine->report->async_bytes += bytes; }
void count_atomic() { ++machine->report->atomics; }
bool copies_are_late() { return machine->config.late; }

void yield(bool changes) {
  Thread& me = *machine->running;
  if (changes) machine->idle = 0;
  machine->moves_on = true;
  ++me.block->yielded;
  wait_as(YIELDED);
}

void back_off() {
  ++machine->idle;
  yield(false);
}

void barrier(const char* file, int line) {
  Block& block = *machine->running->block;
  if (block.waiting && (block.line != line || strcmp(block.file, file))) {
    fail("divergent barrier: threads of a block wait at %s:%d and at %s:%d", block.file, block.line, file, line);
    to_main();
  }
  block.file = file, block.line = line;
  char* order = &block.order[block.generation % 2];
  tsan_release(order);
  ++block.waiting;
  machine->running->state = AT_BARRIER;
  mark(block, machine->running->place.thread.x, false);
  open_barrier_if_complete(block);
  if (machine->running->state == AT_BARRIER) to_main();
  tsan_acquire(order);
}

void collective(Collective kind, unsigned mask, int line, const void* in, void* out) {
  Thread& me = *machine->running;
  const int lane = me.place.thread.x % 32, first = int(me.place.thread.x) - lane;
  Warp& warp = me.block->warps[first / 32];
  if (!(mask >> lane & 1u) || (warp.arrived && (warp.kind != kind || warp.mask != mask || warp.line != line))) {
    fail("divergent warp: lane %d calls a collective at line %d with mask %08x, others at line %d with %08x", lane, line,
         mask, warp.line, warp.mask);
    to_main();
  }
  warp.kind = kind, warp.mask = mask, warp.line = line, warp.in[lane] = in, warp.out[lane] = out;
  warp.arrived |= 1u << lane;
  char* order = &warp.order[warp.generation % 2];
  if (kind == SYNC_WARP) tsan_release(order);
  if (warp.arrived != mask) {
    wait_as(IN_WARP);
  } else {
    perform_collective(warp);
    warp.arrived = 0;
    ++warp.generation;
    for (int i = 0; i < 32; ++i) {
      if (mask >> i & 1u && i != lane) wake(*me.block->threads[first + i]);
    }
  }
  if (kind == SYNC_WARP) tsan_acquire(order);
}

void begin_copy(const Copy& copy) {
  Thread& me = *machine->running;
  if (me.copies_begun - me.copies_done >= MOST_COPIES) {
    fail("a thread has more than %d asynchronous copies under way", MOST_COPIES);
    to_main();
  }
  me.copies[me.copies_begun++ % MOST_COPIES] = copy;
}

void commit_copies() { machine->running->groups.push_back(machine->running->copies_begun); }

const Copy* due_copy(int pending_groups) {
  Thread& me = *machine->running;
  while (int(me.groups.size()) > pending_groups) {
    if (me.copies_done < me.groups.front()) return &me.copies[me.copies_done++ % MOST_COPIES];
    me.groups.pop_front();
  }
  return nullptr;
}

void launch(const Grid* grids, int number, const Config& config, Report& report) {
  Machine m = {};
  machine = &m;
  m.config = config;
  m.report = &report;
  report.failed = 0;
  m.random = config.seed * 2 + 0x9e3779b97f4a7c15ULL;
  m.next_block.assign(number, 0);
  mutant = config.mutant;
  ++report.launches;
  begin_main(m.main);
  run(grids, number);
  tsan_acquire(&m.end);
  for (auto& block : m.blocks) end_block(*block);
  for (unsigned char* memory : m.freed_later) free(memory);
  for (auto& thread : m.spare) free_stack(thread->fiber, STACK_BYTES);
  machine = nullptr;
}

}  // namespace sim
