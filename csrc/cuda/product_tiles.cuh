// How a product is cut: the tiles there are (product_sm90a.cu), what a launch is told, and the items of a live count.
#pragma once
#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace consistentee {
namespace cuda {

constexpr int kWarpgroup = 128;
constexpr int kProductThreads = 3 * kWarpgroup;
constexpr int kStep = 64;           // of K: 128 bytes, the width of a map's box and of the swizzle
constexpr int kBoxRows = 64;        // of x that one copy brings
constexpr int kBoxColumns = 48;     // of W
constexpr int kRing = 5 * (128 + 192) * kStep * 2;
constexpr int kSums = 64 * 48 * 4;  // of the second warpgroup, on path 2
constexpr int kBias = 2 * 192 * 4;  // of two tiles: one is read while the next is written
constexpr int kBarriers = 2 * 16 * 8;
constexpr int kChoices = 128;
constexpr int kChoiceRows = 64;
constexpr int kShared = 1024 + kRing + kSums + kBias + kBarriers + 16;

struct ProductArgs {
  CUtensorMap x, weight;
  const void* bias;
  void* out;
  const int32_t* count;
  int32_t* arrived;
  float* shares;
  float* partials;
  int64_t out_stride;
  int32_t inputs, outputs, bias_fp32;
  uint8_t choice[kChoices];  // by the live count in steps of kChoiceRows: the path, and 8 times log2 of the shares
};

// kSplit: both warpgroups work on the same 64 rows, one on even, one on odd steps of K. kTurns: each on a tile of its
// own.
template <int kRows, int kColumns, int kStages, bool kSplit, bool kTurns = false>
struct Tile {
  static constexpr int rows = kRows, columns = kColumns, stages = kStages;
  static constexpr bool split = kSplit, turns = kTurns;
  static constexpr int x_bytes = kRows * kStep * 2, bytes = x_bytes + kColumns * kStep * 2;
  static_assert(kStages * bytes <= kRing && kStages <= 16 && bytes % 1024 == 0, "the ring must fit");
};
using Tile0 = Tile<128, 192, 5, false>;
using Tile1 = Tile<128, 96, 7, false>;
using Tile2 = Tile<64, 48, 14, true>;
using Tile3 = Tile<128, 48, 9, false>;
using Tile4 = Tile<128, 192, 5, false, true>;

// How the work of a launch is cut: items, each a tile and a share of its K.
struct Plan {
  uint32_t live, blocks_m, blocks_n, shares, items, steps;

  // Blocks of rows vary fastest within a group of 16, so that programs at work together share rows of both operands.
  __device__ void place(uint32_t tile, int32_t& m, int32_t& n) const {
    const uint32_t group = tile / (16 * blocks_n), within = tile - group * 16 * blocks_n;
    const uint32_t height = min(16u, blocks_m - group * 16), column = within / height;
    m = static_cast<int32_t>(group * 16 + within - column * height);
    n = static_cast<int32_t>(column);
  }
  __device__ int32_t step_begin(uint32_t share) const { return static_cast<int32_t>(steps * share / shares); }
};

template <class T>
__host__ __device__ inline Plan plan_of(uint32_t live, uint32_t inputs, uint32_t outputs, uint32_t shares) {
  Plan plan;
  plan.live = live;
  plan.blocks_m = (live + T::rows - 1) / T::rows;
  plan.blocks_n = (outputs + T::columns - 1) / T::columns;
  plan.shares = shares;
  plan.items = plan.blocks_m * plan.blocks_n * shares;
  plan.steps = (inputs + kStep - 1) / kStep;
  return plan;
}

// Calls f with the tile of a path. kTiles: the paths that there are, a bit each, path 2 among them.
template <int kTiles, class F>
__device__ inline void with_tile(int32_t path, F&& f) {
  static_assert(kTiles & 4);
  if constexpr (kTiles & 1) {
    if (path == 0) return f(Tile0{});
  }
  if constexpr (kTiles & 2) {
    if (path == 1) return f(Tile1{});
  }
  if constexpr (kTiles & 8) {
    if (path == 3) return f(Tile3{});
  }
  if constexpr (kTiles & 16) {
    if (path == 4) return f(Tile4{});
  }
  f(Tile2{});
}

}  // namespace cuda
}  // namespace consistentee
