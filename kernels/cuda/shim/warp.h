// What lanes do together: shuffles, ballots and products, by the last of them to arrive.
#pragma once
#include "machine.h"

namespace sim {
namespace {

float element(unsigned short bits, Collective kind) {
  return kind == MMA_BF16 ? ::widened(Bf16{bits}) : ::widened(F16{bits});
}

// m16n8k16 as the PTX ISA lays its fragments out: lane = 4 group + pair; A holds rows group and group + 8, columns
// 2 pair and 2 pair + 8; B the columns of A's rows and column group; D rows group and group + 8, columns 2 pair.
void multiply(Warp& warp) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const Mma& in = *static_cast<const Mma*>(warp.in[lane]);
    const int group = lane / 4, pair = lane % 4 * 2;
    for (int i = 0; i < 4; ++i) {
      for (int half = 0; half < 2; ++half) {
        const unsigned short bits = in.a[i] >> (16 * half) & 0xffffu;
        a[group + i % 2 * 8][pair + i / 2 * 8 + half] = element(bits, warp.kind);
      }
    }
    for (int i = 0; i < 2; ++i) {
      for (int half = 0; half < 2; ++half) {
        const unsigned short bits = in.b[i] >> (16 * half) & 0xffffu;
        b[pair + 8 * i + half][group] = element(bits, warp.kind);
      }
    }
  }
  float d[16][8] = {};
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < 16; ++k) {
      for (int col = 0; col < 8; ++col) d[row][col] += a[row][k] * b[k][col];
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    const Mma& in = *static_cast<const Mma*>(warp.in[lane]);
    const int group = lane / 4, pair = lane % 4 * 2;
    for (int i = 0; i < 4; ++i) in.d[i] += d[group + i / 2 * 8][pair + i % 2];
  }
}

void perform_collective(Warp& warp) {
  Report& report = *machine->report;
  if (warp.kind == MMA_BF16 || warp.kind == MMA_F16) {
    ++report.mma;
    multiply(warp);
    return;
  }
  if (warp.kind == SHUFFLE) ++report.shuffles;
  if (warp.kind == BALLOT) ++report.ballots;
  unsigned ballot = 0;
  for (int lane = 0; lane < 32; ++lane) {
    const bool mine = warp.kind == BALLOT && warp.mask >> lane & 1u;
    if (mine && *static_cast<const unsigned*>(warp.in[lane])) ballot |= 1u << lane;
  }
  for (int lane = 0; lane < 32; ++lane) {
    if (!(warp.mask >> lane & 1u)) continue;
    if (warp.kind == BALLOT) *static_cast<unsigned*>(warp.out[lane]) = ballot;
    if (warp.kind == SHUFFLE) {
      const int from = static_cast<const int*>(warp.in[lane])[1];
      if (!(warp.mask >> from & 1u)) fail("lane %d shuffles from lane %d, which is not in the mask", lane, from);
      else *static_cast<int*>(warp.out[lane]) = *static_cast<const int*>(warp.in[from]);
    }
  }
}

}  // namespace
}  // namespace sim
