// Fibers: a stack and a saved stack pointer (ucontext where the CPU is no x86-64), told to the sanitizers.
#pragma once
#include <stddef.h>
#include <sys/mman.h>

#ifndef __x86_64__
#include <ucontext.h>
#endif

#ifdef SIM_TSAN
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}
#endif
#ifdef SIM_ASAN
extern "C" {
void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t size);
void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom, size_t* size);
void __asan_unpoison_memory_region(void const volatile* address, size_t size);
}
#endif

#ifdef __x86_64__
extern "C" void sim_switch(void** save, void* to);
#endif

namespace sim {
namespace {

#ifdef SIM_TSAN
constexpr bool TSAN = true;
inline void tsan_acquire(void* address) { __tsan_acquire(address); }
inline void tsan_release(void* address) { __tsan_release(address); }
#else
constexpr bool TSAN = false;
inline void tsan_acquire(void*) {}
inline void tsan_release(void*) {}
#endif

struct Fiber {
#ifdef __x86_64__
  void* top = nullptr;
#else
  ucontext_t context;
#endif
  void* stack = nullptr;
  const void* bottom = nullptr;
  size_t size = 0;
  void* fake_stack = nullptr;
  void* tsan = nullptr;
};

#ifdef __x86_64__
asm(R"(
  .text
  .type sim_switch, @function
sim_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size sim_switch, .-sim_switch
)");
#endif

inline void arrived(Fiber& here) {
  (void)here;
#ifdef SIM_ASAN
  const void* bottom;
  size_t size;
  __sanitizer_finish_switch_fiber(here.fake_stack, &bottom, &size);
#endif
}

inline void change(Fiber& from, Fiber& to, bool ends) {
  (void)ends;
#ifdef SIM_ASAN
  __sanitizer_start_switch_fiber(ends ? nullptr : &from.fake_stack, to.bottom, to.size);
#endif
#ifdef SIM_TSAN
  __tsan_switch_to_fiber(to.tsan, 1);  // 1: a switch orders no memory
#endif
#ifdef __x86_64__
  sim_switch(&from.top, to.top);
#else
  swapcontext(&from.context, &to.context);
#endif
}

inline void switch_fiber(Fiber& from, Fiber& to) {
  change(from, to, false);
  arrived(from);
}

[[noreturn]] inline void leave_fiber(Fiber& from, Fiber& to) {
  change(from, to, true);
  __builtin_unreachable();
}

void (*fiber_body)() = nullptr;
Fiber* fiber_main = nullptr;

inline void begin_main(Fiber& main) {
  fiber_main = &main;
#ifdef SIM_TSAN
  main.tsan = __tsan_get_current_fiber();
#endif
}

inline void fiber_entry() {
#ifdef SIM_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &fiber_main->bottom, &fiber_main->size);
#endif
  fiber_body();
}

inline void allocate_stack(Fiber& fiber, size_t bytes) {
  fiber.stack = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  fiber.bottom = fiber.stack;
  fiber.size = bytes;
}

inline void free_stack(Fiber& fiber, size_t bytes) { munmap(fiber.stack, bytes); }

inline void begin_fiber(Fiber& fiber, void (*body)()) {
  fiber_body = body;
#ifdef SIM_ASAN
  __asan_unpoison_memory_region(fiber.stack, fiber.size);
#endif
#ifdef SIM_TSAN
  fiber.tsan = __tsan_create_fiber(0);
#endif
#ifdef __x86_64__
  void** top = reinterpret_cast<void**>(static_cast<char*>(fiber.stack) + fiber.size) - 1;  // aligned as after a call
  *top = nullptr;
  *--top = reinterpret_cast<void*>(&fiber_entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  fiber.top = top;
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = fiber.size;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, &fiber_entry, 0);
#endif
}

inline void end_fiber(Fiber& fiber) {
  (void)fiber;
#ifdef SIM_TSAN
  __tsan_destroy_fiber(fiber.tsan);
#endif
}

}  // namespace
}  // namespace sim
