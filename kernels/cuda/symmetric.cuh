// The layer over several devices: experts are spread over them, rows travel by one-sided writes into peers' memory.
#pragma once
#include "moe.cuh"

struct SymmetricShape {
  int peers, experts, capacity, hidden;
  long long offset(int peer, int round, int stage, int expert, int slot) const { return 0; }
};
#define moe_symmetric_bfloat16 moe_fused_bfloat16
#define moe_symmetric_float16 moe_fused_float16
