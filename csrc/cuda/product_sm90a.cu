// out[:n] = act(x[:n] W^T + b) on Hopper's own instructions: the copy engine fills a ring in shared memory (TMA,
// 128-byte swizzle), one thread starts the copies, two warpgroups multiply (wgmma). The launch is as wide as the
// device, every program takes tiles in turn, so one launch serves any number of live rows; the tile is chosen by that
// number:
//
//   path 0   128 x 192, each warpgroup 64 rows         N of 768 k and 16 k rows come out as 97 % full rounds of 132
//   path 1   128 x 96, the same                        fewer rows: twice the tiles
//   path 2   64 x 48, warpgroups take turns along K    few rows; programs that would idle share a tile along K
//   path 3   128 x 48, as path 0                       about 1 000 rows and few outputs: again twice the tiles
//   path 4   128 x 192, warpgroups take tiles in turn  three rounds and more: one multiplies while the other stores
//
// A tile that is shared along K leaves partial sums for the reader of the result (product.h), on all paths but 4;
// without one who adds them up, path 2 alone is shared, and the program that comes last does it. Always in the order
// of the shares, so the result does not depend on who that is. Limited by FLOPs from about 1 000 rows on, below by
// the bytes of W and latency. L2 gives every multiprocessor some 84 GB/s, which is what a step of K takes on all
// paths.
//
// Code counts by its length, since every launch of a pass brings its kernel back from L2 or memory. From 46 and 53
// KB (without and with GELU) to 39 and 50, path 3 added, a pass of up to 1 024 tokens took a tenth less; at 76 and
// 92 KB, tiles added that it did not use, one of 4 096 took 5 % more. So loops are not unrolled without need, the
// tile is looked up by the live count and not reckoned, the first product of a tile writes its sums, which nobody
// has to clear, and a kernel holds few more tiles than its capacity can ask for (2 % at 128 tokens).
//
// Tried and left out: storing one tile while the next is multiplied, with two sets of sums a thread (the product
// takes the register file's bandwidth, and GELU ran at a quarter of its speed beside it; in turn it is spread over
// all of the next product) or by way of shared memory and the copy engine (8 % more for a pass of 4 096 tokens).
// Pairs of programs (clusters) that bring x for each other: 2 us more for a launch, and a pair waits for its slower
// half at every tile. Putting the sums of shared tiles of path 1 together here: that takes what it saves. A tile of
// 128 x 144: 1 us less for QKV of 1 024 rows, and its code costs all others as much. The next product's weights
// brought to L2 meanwhile: no gain at 128 tokens, 1 to 5 % more from 1 024 on. A product's own weights brought while
// the kernel in front still runs: to L2, no gain; into the ring, 3 to 9 % slower at 128 to 1 024 tokens, and the
// count read that early gains nothing.
#include <cuda.h>

#include <type_traits>

#include "device.cuh"
#include "product.h"
#include "wgmma.cuh"

namespace consistentee {
namespace cuda {

constexpr int kWarpgroup = 128;
constexpr int kProductThreads = 3 * kWarpgroup;
constexpr int kStep = 64;           // of K: 128 bytes, the width of the swizzle
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

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define EE_HOPPER 1
#endif

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

#ifdef EE_HOPPER

__device__ inline uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

__device__ inline void barrier_init(uint64_t* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals));
}
__device__ inline void barrier_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
__device__ inline void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
__device__ inline void barrier_wait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra ready;\n"
      "bra again;\n"
      "ready:\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}
__device__ inline void copy_tile(void* to, const CUtensorMap* map, uint64_t* barrier, int32_t column, int32_t row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
          shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(row)
      : "memory");
}
// Rows of 128 bytes in groups of 8 (1 024 bytes), swizzled; a step of 16 along K is 32 bytes further.
__device__ inline uint64_t tile_descriptor(const char* tile) {
  return (static_cast<uint64_t>(shared_address(tile) & 0x3ffff) >> 4) | (1ull << 16) | (64ull << 32) | (1ull << 62);
}
__device__ inline void warpgroup_arrive() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void warpgroup_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ inline void warpgroup_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
__device__ inline void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
// The half of it that does not wait.
__device__ inline void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
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

struct Ring {
  char* data;
  uint64_t* full;
  uint64_t* empty;
};

template <class T>
__device__ void produce(const ProductArgs& args, const Plan& plan, const Ring& ring) {
  int stage = 0;
  uint32_t phase = 1;  // a fresh barrier counts as passed
#pragma unroll 1
  for (uint32_t item = blockIdx.x; item < plan.items; item += gridDim.x) {
    int32_t m, n;
    plan.place(item / plan.shares, m, n);
    const uint32_t share = item % plan.shares;
#pragma unroll 1
    for (int32_t k = plan.step_begin(share); k < plan.step_begin(share + 1); ++k) {
      barrier_wait(ring.empty + stage, phase);
      barrier_expect(ring.full + stage, T::bytes);
      char* to = ring.data + stage * T::bytes;
#pragma unroll
      for (int i = 0; i < T::rows / kBoxRows; ++i) {
        copy_tile(to + i * kBoxRows * kStep * 2, &args.x, ring.full + stage, k * kStep, m * T::rows + i * kBoxRows);
      }
#pragma unroll
      for (int i = 0; i < T::columns / kBoxColumns; ++i) {
        copy_tile(to + T::x_bytes + i * kBoxColumns * kStep * 2, &args.weight, ring.full + stage, k * kStep,
                  n * T::columns + i * kBoxColumns);
      }
      if (++stage == T::stages) {
        stage = 0;
        phase ^= 1;
      }
    }
  }
}

template <bool kBfloat16>
__device__ inline uint32_t pack(float low, float high) {
  if constexpr (kBfloat16) {
    const __nv_bfloat162 two = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t&>(two);
  } else {
    const __half2 two = __floats2half2_rn(low, high);
    return reinterpret_cast<const uint32_t&>(two);
  }
}

template <bool kBfloat16>
__device__ inline float bias_at(const ProductArgs& args, int32_t column) {
  if (args.bias == nullptr || column >= args.outputs) return 0.f;
  if (args.bias_fp32) return __ldg(static_cast<const float*>(args.bias) + column);
  if constexpr (kBfloat16) {
    return __bfloat162float(__ldg(static_cast<const __nv_bfloat16*>(args.bias) + column));
  } else {
    return __half2float(__ldg(static_cast<const __half*>(args.bias) + column));
  }
}

// x Phi(x) = max(x, 0) - |x| Q(|x|), Q(a) = 1 - Phi(a) = 2^P(a): the logarithm of a normal's tail is smooth enough for a
// polynomial of degree 5 (our fit on [0, 6], weighted by what a 16-bit result can show; falling beyond). Off by at most
// 1e-5, and by a quarter of the spacing of fp16. Half the instructions of Abramowitz and Stegun 7.1.26, and one of the
// slow ones (16 a cycle) where that has two.
__device__ inline float quick_gelu(float x) {
  const float size = fabsf(x);
  float p = fmaf(size, -0.00035449457f, 0.0061684139f);
  p = fmaf(p, size, -0.049437225f);
  p = fmaf(p, size, -0.46237022f);
  p = fmaf(p, size, -1.1501307f);
  p = fmaf(p, size, -1.f);
  float tail;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(tail) : "f"(p));
  return fmaf(-size, tail, fmaxf(x, 0.f));
}

template <bool kGelu>
__device__ inline float finish(float x) {
  if constexpr (kGelu) return quick_gelu(x);
  return x;
}

// Turns a block of words held by the four lanes of a quad (4 x 4, or two of 2 x 2), so that each lane has its words
// side by side.
template <int kWords>
__device__ inline void turn(uint32_t (&w)[kWords], int lane) {
  const bool odd = lane & 1, upper = lane & 2;
#pragma unroll
  for (int i = 0; i < kWords; i += 2) {
    const uint32_t got = __shfl_xor_sync(0xffffffffu, odd ? w[i] : w[i + 1], 1);
    if (odd) {
      w[i] = got;
    } else {
      w[i + 1] = got;
    }
  }
  if constexpr (kWords == 4) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t got = __shfl_xor_sync(0xffffffffu, upper ? w[i] : w[i + 2], 2);
      if (upper) {
        w[i] = got;
      } else {
        w[i + 2] = got;
      }
    }
  }
}

// The 64 rows of one warpgroup: bias, activation, rounding, stores of 16 bytes (8 where the tile is 48 wide). `sums` as
// wgmma leaves them: lane l of warp w holds rows 16 w + l / 4 and 8 further down, columns 8 j + 2 (l % 4) and the next.
template <int kColumns, bool kBfloat16, bool kGelu>
__device__ void store_rows(const ProductArgs& args, float (&sums)[kColumns / 2], const float* biases, int32_t first_row,
                           int32_t live, int32_t first_column) {
  constexpr int kWords = kColumns % 32 == 0 ? 4 : 2;  // of a lane and row at a time
  using Words = typename std::conditional<kWords == 4, uint4, uint2>::type;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, quad = lane % 4;
  const int32_t row = first_row + warp * 16 + lane / 4;
  const bool upper_lives = row < live, lower_lives = row + 8 < live;
  // Behind `turn` a lane has block `quad` of 4 x 8 columns, or one half of block `quad % 2` of 2 x 8.
  int32_t column = first_column + (kWords == 4 ? 8 * quad : quad % 2 * 8 + quad / 2 * 4);
  uint16_t* upper = static_cast<uint16_t*>(args.out) + row * args.out_stride + column;
  uint16_t* lower = upper + 8 * args.out_stride;
  biases += 2 * quad;
  // A loop, though registers have no index: sums move down instead. Written out, the code is several times as long, and
  // every launch in a pass fetches it anew.
#pragma unroll 1
  for (int32_t at = 0; at < kColumns; at += 8 * kWords) {
    uint32_t high[kWords], low[kWords];
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const float2 bias = *reinterpret_cast<const float2*>(biases + 8 * i);
      high[i] = pack<kBfloat16>(finish<kGelu>(sums[4 * i] + bias.x), finish<kGelu>(sums[4 * i + 1] + bias.y));
      low[i] = pack<kBfloat16>(finish<kGelu>(sums[4 * i + 2] + bias.x), finish<kGelu>(sums[4 * i + 3] + bias.y));
    }
    turn(high, lane);
    turn(low, lane);
    if (column < args.outputs) {
      if (upper_lives) *reinterpret_cast<Words*>(upper) = reinterpret_cast<const Words&>(high);
      if (lower_lives) *reinterpret_cast<Words*>(lower) = reinterpret_cast<const Words&>(low);
    }
    column += 8 * kWords;
    upper += 8 * kWords;
    lower += 8 * kWords;
    biases += 8 * kWords;
#pragma unroll
    for (int i = 0; i + 4 * kWords < kColumns / 2; ++i) sums[i] = sums[i + 4 * kWords];
  }
}

// The share of this program as it is, for whoever reads the result to add up (product.h). `sums` as in `store_rows`;
// the four lanes of a quad write 32 bytes of a row together.
template <int kColumns>
__device__ void store_partial(const ProductArgs& args, const Plan& plan, float (&sums)[kColumns / 2],
                              const float* biases, int32_t first_row, int32_t first_column, uint32_t share) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, quad = lane % 4;
  const uint32_t row = first_row + warp * 16 + lane / 4;
  const bool upper_lives = row < plan.live, lower_lives = row + 8 < plan.live;
  int32_t column = first_column + 2 * quad;
  // Rows times outputs fit into 32 bits: all partial sums do (kProductPartials).
  float* upper = args.partials + ((row * plan.shares + share) * args.outputs + column);
  float* lower = upper + 8 * plan.shares * args.outputs;
  biases += 2 * quad;
#pragma unroll 1
  for (int32_t at = 0; at < kColumns; at += 16) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float2 bias = *reinterpret_cast<const float2*>(biases + 8 * i);
      if (share != 0) bias = {0.f, 0.f};
      if (column + 8 * i < args.outputs) {
        const float* const own = sums + 4 * i;
        if (upper_lives) __stcg(reinterpret_cast<float2*>(upper + 8 * i), {own[0] + bias.x, own[1] + bias.y});
        if (lower_lives) __stcg(reinterpret_cast<float2*>(lower + 8 * i), {own[2] + bias.x, own[3] + bias.y});
      }
    }
    column += 16;
    upper += 16;
    lower += 16;
    biases += 16;
#pragma unroll
    for (int i = 0; i + 8 < kColumns / 2; ++i) sums[i] = sums[i + 8];
  }
}

// The share of this program joins the others' of its tile. True for the one that came last: it has the whole sum.
template <int kSize>
__device__ bool join_shares(const ProductArgs& args, const Plan& plan, int32_t item, float (&sums)[kSize], int* last) {
  const int thread = threadIdx.x % kWarpgroup;
  const int32_t tile = item / plan.shares, share = item % plan.shares;
  // Four sums of a thread stand together, so that a warp moves 512 bytes at a time.
  static_assert(kSize % 4 == 0);
  float4* const base = reinterpret_cast<float4*>(args.shares) +
                       static_cast<int64_t>(tile) * plan.shares * (kSize / 4 * kWarpgroup) + thread;
#pragma unroll
  for (int i = 0; i < kSize / 4; ++i) {
    __stcg(base + (share * (kSize / 4) + i) * kWarpgroup,
           {sums[4 * i], sums[4 * i + 1], sums[4 * i + 2], sums[4 * i + 3]});
  }
  // One fence for all: what the others wrote before the barrier is released with the count, and what the last one reads
  // behind the next barrier is acquired with it.
  named_barrier(3, kWarpgroup);
  if (thread == 0) {
    int32_t before;
    asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], 1;" : "=r"(before) : "l"(args.arrived + tile) : "memory");
    const bool all = before == static_cast<int32_t>(plan.shares) - 1;
    if (all) args.arrived[tile] = 0;  // for the next launch: nobody else comes in this one
    *last = all;
  }
  named_barrier(3, kWarpgroup);
  if (!*reinterpret_cast<volatile int*>(last)) return false;
#pragma unroll
  for (int i = 0; i < kSize; ++i) sums[i] = 0.f;
#pragma unroll 1
  for (int32_t other = 0; other < plan.shares; ++other) {
    float4 read[kSize / 4];  // all on their way before the first is used
#pragma unroll
    for (int i = 0; i < kSize / 4; ++i) read[i] = __ldcg(base + (other * (kSize / 4) + i) * kWarpgroup);
#pragma unroll
    for (int i = 0; i < kSize / 4; ++i) {
      sums[4 * i] += read[i].x;
      sums[4 * i + 1] += read[i].y;
      sums[4 * i + 2] += read[i].z;
      sums[4 * i + 3] += read[i].w;
    }
  }
  return true;
}

template <class T, bool kBfloat16, bool kGelu, bool kPartials>
__device__ void consume(const ProductArgs& args, const Plan& plan, const Ring& ring, float* second, float* biases,
                        int* last) {
  const int group = threadIdx.x / kWarpgroup - 1;  // 0 or 1
  const int column = threadIdx.x - kWarpgroup;     // of a tile, whose bias this thread fetches
  // Every warp on its own: it knows of its own reads only. A stage is empty after 8 arrivals, on path 2 two of a warp.
  const bool signals = threadIdx.x % (T::split ? 16 : 32) == 0;
  uint32_t base = 0;  // steps of the tiles before
  bool turned = false;  // to the second set of biases
#pragma unroll 1
  for (uint32_t item = blockIdx.x; item < plan.items; item += gridDim.x) {
    int32_t m, n;
    plan.place(item / plan.shares, m, n);
    const uint32_t share = item % plan.shares;
    const int32_t steps = plan.step_begin(share + 1) - plan.step_begin(share);
    float sums[T::columns / 2];  // the first product writes them
    const float bias = column < T::columns ? bias_at<kBfloat16>(args, n * T::columns + column) : 0.f;
    int32_t held = -1;  // the stage that the product in flight reads
    const uint32_t first = base + (T::split ? group : 0);
    int stage = static_cast<int>(first % T::stages);
    uint32_t phase = first / T::stages & 1;
#pragma unroll 1
    for (int32_t k = T::split ? group : 0; k < steps; k += T::split ? 2 : 1) {
      barrier_wait(ring.full + stage, phase);
      const char* const tile = ring.data + stage * T::bytes;
      const uint64_t x = tile_descriptor(tile + (T::split ? 0 : group * kBoxRows * kStep * 2));
      const uint64_t weight = tile_descriptor(tile + T::x_bytes);
      warpgroup_arrive();
#pragma unroll
      for (int i = 0; i < kStep / 16; ++i) {
        multiply<T::columns, kBfloat16>(sums, x + 2 * i, weight + 2 * i, i > 0 || held >= 0);
      }
      warpgroup_commit();
      warpgroup_wait<1>();
      if (held >= 0 && signals) barrier_arrive(ring.empty + held);
      held = stage;
      stage += T::split ? 2 : 1;
      if (stage >= T::stages) {
        stage -= T::stages;
        phase ^= 1;
      }
    }
    warpgroup_wait<0>();
    if (held >= 0 && signals) barrier_arrive(ring.empty + held);
    base += steps;
    if (column < T::columns) biases[column] = bias;
    if constexpr (T::split) {
      if (held < 0) {  // K has one step, which is the other warpgroup's
#pragma unroll
        for (int i = 0; i < T::columns / 2; ++i) sums[i] = 0.f;
      }
      const int thread = threadIdx.x % kWarpgroup;
      if (group == 1) {
#pragma unroll
        for (int i = 0; i < T::columns / 2; ++i) second[i * kWarpgroup + thread] = sums[i];
      }
      named_barrier(1, 2 * kWarpgroup);
      if (group == 0) {
#pragma unroll
        for (int i = 0; i < T::columns / 2; ++i) sums[i] += second[i * kWarpgroup + thread];
        const int32_t row = m * T::rows, output = n * T::columns;
        if (kPartials && plan.shares > 1) {
          store_partial<T::columns>(args, plan, sums, biases, row, output, share);
        } else if (kPartials || plan.shares == 1 || join_shares(args, plan, item, sums, last)) {
          store_rows<T::columns, kBfloat16, kGelu>(args, sums, biases, row, plan.live, output);
        }
      }
      named_barrier(2, 2 * kWarpgroup);
    } else {
      // One barrier is enough: who writes these biases again has met the other warpgroup at the next tile's.
      named_barrier(1, 2 * kWarpgroup);
      const int32_t row = m * T::rows + group * kBoxRows, output = n * T::columns;
      if (kPartials && plan.shares > 1) {
        store_partial<T::columns>(args, plan, sums, biases, row, output, share);
      } else {
        store_rows<T::columns, kBfloat16, kGelu>(args, sums, biases, row, plan.live, output);
      }
      biases += turned ? -192 : 192;
      turned = !turned;
    }
  }
}

// Tiles in turn: while one warpgroup stores its tile, the other multiplies the next. Who is to multiply waits until the
// other has seen all steps of its tile arrive: a stage tells this round from the one before, and no further back.
// `biases`: twice 192 for each warpgroup.
template <class T, bool kBfloat16, bool kGelu>
__device__ void consume_in_turn(const ProductArgs& args, const Plan& plan, const Ring& ring, float* biases) {
  const int group = threadIdx.x / kWarpgroup - 1, thread = threadIdx.x % kWarpgroup;
  const bool signals = threadIdx.x % 16 == 0;  // 8 arrivals a stage, all of them this warpgroup's
  biases += group * 2 * T::columns;
  bool turned = false;
  const uint32_t steps = plan.steps;
  uint32_t base = group * steps;
#pragma unroll 1
  for (uint32_t item = blockIdx.x + group * gridDim.x; item < plan.items; item += 2 * gridDim.x) {
    int32_t m, n;
    plan.place(item, m, n);
    float upper[T::columns / 2], lower[T::columns / 2];  // rows 0 to 63, and 64 to 127
    const int32_t column = n * T::columns + thread;
    const bool twice = thread < T::columns - kWarpgroup;  // it fetches the bias of two columns
    const float bias = bias_at<kBfloat16>(args, column);
    const float more_bias = twice ? bias_at<kBfloat16>(args, column + kWarpgroup) : 0.f;
    int32_t held = -1;
    int stage = static_cast<int>(base % T::stages);
    uint32_t phase = base / T::stages & 1;
    if (base > 0) named_barrier(4 + group, 2 * kWarpgroup);
#pragma unroll 1
    for (uint32_t k = 0; k < steps; ++k) {
      barrier_wait(ring.full + stage, phase);
      const char* const tile = ring.data + stage * T::bytes;
      const uint64_t x = tile_descriptor(tile), more_x = tile_descriptor(tile + kBoxRows * kStep * 2);
      const uint64_t weight = tile_descriptor(tile + T::x_bytes);
      warpgroup_arrive();
#pragma unroll
      for (int i = 0; i < kStep / 16; ++i) {
        multiply<T::columns, kBfloat16>(upper, x + 2 * i, weight + 2 * i, i > 0 || held >= 0);
        multiply<T::columns, kBfloat16>(lower, more_x + 2 * i, weight + 2 * i, i > 0 || held >= 0);
      }
      warpgroup_commit();
      warpgroup_wait<1>();
      if (held >= 0 && signals) barrier_arrive(ring.empty + held);
      held = stage;
      if (++stage == T::stages) {
        stage = 0;
        phase ^= 1;
      }
    }
    if (item + gridDim.x < plan.items) named_barrier_arrive(5 - group, 2 * kWarpgroup);
    warpgroup_wait<0>();
    if (signals) barrier_arrive(ring.empty + held);
    base += 2 * steps;
    biases[thread] = bias;
    if (twice) biases[kWarpgroup + thread] = more_bias;
    // One barrier is enough: these biases are written again two of this warpgroup's tiles later.
    named_barrier(1 + group, kWarpgroup);
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {
      const int32_t row = m * T::rows + half * kBoxRows;
      store_rows<T::columns, kBfloat16, kGelu>(args, upper, biases, row, plan.live, n * T::columns);
#pragma unroll
      for (int i = 0; i < T::columns / 2; ++i) upper[i] = lower[i];
    }
    biases += turned ? -T::columns : T::columns;
    turned = !turned;
  }
}

#endif  // EE_HOPPER

template <bool kBfloat16, bool kGelu, bool kPartials, int kTiles>
__global__ void __launch_bounds__(kProductThreads, 1) product_kernel(const __grid_constant__ ProductArgs args) {
#ifdef EE_HOPPER
  extern __shared__ char memory[];
  // An offset, not a rounded pointer, of which the compiler would no longer know that it is shared memory.
  char* const start = memory + (-shared_address(memory) & 1023);
  float* const second = reinterpret_cast<float*>(start + kRing);
  float* const biases = second + kSums / 4;
  Ring ring;
  ring.data = start;
  ring.full = reinterpret_cast<uint64_t*>(start + kRing + kSums + kBias);
  ring.empty = ring.full + 16;
  int* const last = reinterpret_cast<int*>(ring.empty + 16);

  if (threadIdx.x == 0) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&args.x) : "memory");
    asm volatile("prefetch.tensormap [%0];" ::"l"(&args.weight) : "memory");
    // Full: the one thread that starts the copies. Empty: the warps that read a stage.
#pragma unroll 1
    for (int i = 0; i < 16; ++i) {
      barrier_init(ring.full + i, 1);
      barrier_init(ring.empty + i, 8);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  // Everything above ran beside the kernel in front, where it allows that; from here on its results are needed.
  asm volatile("griddepcontrol.wait;" ::: "memory");
  const int32_t live = *args.count;
  if (live <= 0) return;
  const int32_t choice = args.choice[min((live - 1) / kChoiceRows, kChoices - 1)], path = choice & 7;
  const uint32_t shares = 1u << (choice >> 3);
  __syncthreads();
  if (threadIdx.x < kWarpgroup) {
    // A tile of 128 x 192 in the registers of one warpgroup.
    if constexpr (kTiles & 16) asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x != 0) return;
    with_tile<kTiles>(path, [&](auto tile) {
      using T = decltype(tile);
      produce<T>(args, plan_of<T>(live, args.inputs, args.outputs, shares), ring);
    });
    // Only now: what waits on this multiprocessor meanwhile would be in the way.
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    return;
  }
  if constexpr (kTiles & 16) asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
  with_tile<kTiles>(path, [&](auto tile) {
    using T = decltype(tile);
    const Plan plan = plan_of<T>(live, args.inputs, args.outputs, shares);
    if constexpr (T::turns) {
      consume_in_turn<T, kBfloat16, kGelu>(args, plan, ring, second);
    } else {
      consume<T, kBfloat16, kGelu, kPartials>(args, plan, ring, second, biases, last);
    }
  });
#endif
}

namespace {

using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                            const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                            CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

const char* encoder(Encode* encode) {
  static void* found = nullptr;
  if (found == nullptr) {
    cudaDriverEntryPointQueryResult state;
#if CUDART_VERSION >= 12050
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &state);
#else
    const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &state);
#endif
    if (error != cudaSuccess) return error_text(error);
    if (found == nullptr) return "the driver has no cuTensorMapEncodeTiled: it is older than CUDA 12";
  }
  *encode = reinterpret_cast<Encode>(found);
  return nullptr;
}

const char* encode_map(CUtensorMap* map, const void* data, int64_t rows, int64_t columns, int64_t stride, int box_rows,
                       bool bfloat16) {
  Encode encode;
  if (const char* error = encoder(&encode)) return error;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(stride) * 2};
  const cuuint32_t box[2] = {kStep, static_cast<cuuint32_t>(box_rows)}, steps[2] = {1, 1};
  const CUresult result = encode(map, bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2,
                                 const_cast<void*>(data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                                 CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                                 CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? nullptr : "cuTensorMapEncodeTiled refused the operand's address, size or stride";
}

// The tile and the shares for a live count, by what they take in ns: rounds of the device times a tile's time. A step
// takes what its bytes take at 84 GB/s; the beginning and end of a tile are fitted to measured launches. Partial sums
// are written and read at 5 500 bytes a ns (reckoned), instead of one row of 16 bits.
struct Choice {
  uint32_t path, doublings, cost;
};
template <class T>
void consider(Choice& best, const ProductCall& call, uint32_t path, uint32_t live, uint32_t programs, uint32_t most) {
  constexpr uint32_t kTile = T::columns == 192 ? 2400 : 1300, kJoin = 2000, kPartial = 300;
  const auto inputs = static_cast<uint32_t>(call.inputs), outputs = static_cast<uint32_t>(call.outputs);
  const bool leaves = call.partials != nullptr;
  if (!leaves) most = call.workspace != nullptr && T::split ? 3 : 0;
  if (T::turns) most = 0;
  for (uint32_t doublings = 0; doublings <= most; ++doublings) {
    const Plan plan = plan_of<T>(live, inputs, outputs, 1u << doublings);
    if (doublings > 0 && (plan.items > programs || 2 * plan.shares >= plan.steps)) break;
    const uint32_t rounds = (plan.items + programs - 1) / programs;
    const uint32_t product = plan.steps / plan.shares * (T::bytes / 84);
    // In turn, the last tile alone is stored while nothing is multiplied, by one warpgroup where else there are two.
    uint32_t cost = T::turns ? rounds * product + 2 * kTile : rounds * (product + kTile);
    if (doublings > 0) cost += leaves ? kPartial + live * outputs / 1375 * (2 * plan.shares - 1) : rounds * kJoin;
    if (cost < best.cost) best = {path, doublings, cost};
  }
}
Choice choose(const ProductCall& call, uint32_t live, uint32_t programs, uint32_t most) {
  Choice best = {0, 0, ~0u};
  const auto may = [&](int path) { return call.path < 0 || call.path == path; };
  if (may(0)) consider<Tile0>(best, call, 0, live, programs, most);
  if (may(1)) consider<Tile1>(best, call, 1, live, programs, most);
  // Many outputs have tiles enough: there path 3 gains too little to be worth its code.
  if (call.path == 3 || (may(3) && call.outputs <= 1024)) consider<Tile3>(best, call, 3, live, programs, most);
  if (may(2)) consider<Tile2>(best, call, 2, live, programs, most);
  if (may(4)) consider<Tile4>(best, call, 4, live, programs, most);
  return best;
}

// For every count of the table. Partial sums become fewer with more rows and never more again, so that two limits tell
// a reader how many there are. The last entry, which stands for all greater counts, has none: their memory has an end;
// it is chosen for four times its count, where many rounds decide.
void choose_all(const ProductCall& call, uint32_t programs, Choice (&choices)[kChoices]) {
  uint32_t most = 2;
  for (uint32_t i = 0; i < kChoices; ++i) {
    if (i == kChoices - 1) most = 0;
    const uint32_t live = (i == kChoices - 1 ? 4 * kChoices : i + 1) * kChoiceRows;
    choices[i] = choose(call, live, programs, most);
    most = choices[i].doublings;
  }
}

const char* programs_of_device(uint32_t* programs) {
  int device = 0, count = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error_text(error);
  *programs = count < kProductPrograms ? count : kProductPrograms;
  return nullptr;
}

// A kernel with the paths that a launch may take and few others: the shorter, the sooner at work.
template <bool kBfloat16, bool kGelu, bool kPartials>
const char* launch(const ProductArgs& args, unsigned programs, int used, void* stream) {
  const auto within = [&](int tiles) { return (used & ~tiles) == 0; };
  const auto kernel = within(0b0100)   ? product_kernel<kBfloat16, kGelu, kPartials, 0b0100>
                      : within(0b1100) ? product_kernel<kBfloat16, kGelu, kPartials, 0b1100>
                      : within(0b0111) ? product_kernel<kBfloat16, kGelu, kPartials, 0b0111>
                      : within(0b1111) ? product_kernel<kBfloat16, kGelu, kPartials, 0b1111>
                                       : product_kernel<kBfloat16, kGelu, kPartials, 0b11111>;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
  if (error != cudaSuccess) return error_text(error);
  return launch_early(kernel, programs, kProductThreads, kShared, stream, args);
}

}  // namespace

}  // namespace cuda
}  // namespace consistentee

int64_t consistentee_product_workspace() { return kProductWorkspace; }
int64_t consistentee_product_partials() { return kProductPartials; }

const char* consistentee_product_limits(int64_t inputs, int64_t outputs, int32_t* four, int32_t* two) {
  using namespace consistentee::cuda;
  uint32_t programs;
  if (const char* error = programs_of_device(&programs)) return error;
  float somewhere = 0.f;
  ProductCall call{};
  call.partials = &somewhere;
  call.inputs = inputs;
  call.outputs = outputs;
  call.path = -1;
  Choice choices[kChoices];
  choose_all(call, programs, choices);
  *four = *two = 0;
  for (int i = 0; i < kChoices; ++i) {
    if (choices[i].doublings == 2) *four = (i + 1) * kChoiceRows;
    if (choices[i].doublings >= 1) *two = (i + 1) * kChoiceRows;
  }
  return nullptr;
}

const char* consistentee_product(const ProductCall* call) {
  using namespace consistentee::cuda;
  if (call->capacity == 0 || call->outputs == 0) return nullptr;
  if (call->gelu && call->partials != nullptr) return "partial sums have no activation";
  uint32_t programs;
  if (const char* error = programs_of_device(&programs)) return error;
  ProductArgs args;
  const bool bfloat16 = call->bfloat16 != 0;
  if (const char* text = encode_map(&args.x, call->x, call->rows, call->inputs, call->x_stride, kBoxRows, bfloat16)) {
    return text;
  }
  if (const char* text = encode_map(&args.weight, call->weight, call->outputs, call->inputs, call->weight_stride,
                                    kBoxColumns, bfloat16)) {
    return text;
  }
  args.bias = call->bias;
  args.out = call->out;
  args.count = call->count;
  args.arrived = static_cast<int32_t*>(call->workspace);
  args.shares = call->workspace == nullptr ? nullptr : reinterpret_cast<float*>(args.arrived + kProductPrograms);
  args.partials = call->partials;
  args.out_stride = call->out_stride;
  args.inputs = static_cast<int32_t>(call->inputs);
  args.outputs = static_cast<int32_t>(call->outputs);
  args.bias_fp32 = call->bias_fp32;
  Choice choices[kChoices];
  choose_all(*call, programs, choices);
  int used = 0;
  for (int i = 0; i < kChoices; ++i) {
    args.choice[i] = static_cast<uint8_t>(choices[i].path | choices[i].doublings << 3);
    // The last entry stands for all greater counts.
    if (static_cast<int64_t>(i) * kChoiceRows < call->capacity) used |= 1 << (args.choice[i] & 7);
  }
  const auto launch_for = [&](auto brain) {
    constexpr bool kBrain = decltype(brain)::value;
    return call->gelu       ? launch<kBrain, true, false>(args, programs, used, call->stream)
           : call->partials ? launch<kBrain, false, true>(args, programs, used, call->stream)
                            : launch<kBrain, false, false>(args, programs, used, call->stream);
  };
  return bfloat16 ? launch_for(std::true_type{}) : launch_for(std::false_type{});
}
