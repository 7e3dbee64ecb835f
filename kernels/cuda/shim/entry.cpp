// The kernels by name, with arguments as cuLaunchKernel takes them: an array of pointers, one to each argument.
#include "../symmetric.cuh"

#include <stdio.h>

#include <utility>

namespace {

template <class... A, size_t... I>
void call(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
  kernel(*static_cast<A*>(arguments[I])...);
}

template <auto KERNEL>
void body(void** arguments) {
  [&]<class... A>(void (*kernel)(A...)) { call(kernel, arguments, std::index_sequence_for<A...>()); }(KERNEL);
}

struct Named {
  const char* name;
  void (*body)(void**);
};
#define KERNEL(name) {#name, body<&name>}
constexpr Named KERNELS[] = {
    KERNEL(moe_fused_bfloat16),        KERNEL(moe_fused_float16),        KERNEL(moe_gate_up_bfloat16),
    KERNEL(moe_gate_up_float16),       KERNEL(moe_down_combine_bfloat16), KERNEL(moe_down_combine_float16),
    KERNEL(moe_symmetric_bfloat16),    KERNEL(moe_symmetric_float16),
};

}  // namespace

extern "C" {

struct NamedGrid {
  const char* kernel;
  int blocks, threads, shared_bytes;
  void** arguments;
};

// Runs `number` kernels at the same time, each on its own emulated device; returns 0, or 1 and says why in the report.
int sim_launch(const NamedGrid* grids, int number, const sim::Config* config, sim::Report* report) {
  sim::Grid found[64];
  for (int i = 0; i < number; ++i) {
    found[i] = {nullptr, grids[i].arguments, grids[i].blocks, grids[i].threads, grids[i].shared_bytes};
    for (const Named& one : KERNELS) {
      if (!strcmp(one.name, grids[i].kernel)) found[i].body = one.body;
    }
    if (!found[i].body) {
      snprintf(report->message, sizeof report->message, "there is no kernel %s", grids[i].kernel);
      return report->failed = 1;
    }
  }
  sim::launch(found, number, *config, *report);
  return report->failed;
}

int sim_shared_bytes() { return sizeof(Shared); }

long long sim_symmetric_offset(int peers, int experts, int capacity, int hidden, int peer, int round, int stage,
                               int expert, int slot) {
  return SymmetricShape{peers, experts, capacity, hidden}.offset(peer, round, stage, expert, slot);
}
}
