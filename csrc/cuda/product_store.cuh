// What happens to a tile's sums: bias, activation, rounding and stores; or put together with, or left beside, the other
// shares of its K.
#pragma once
#include <type_traits>

#include "hopper.cuh"
#include "pack.cuh"
#include "product_tiles.cuh"

namespace consistentee {
namespace cuda {

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

// x Phi(x) = max(x, 0) - |x| Q(|x|), Q(a) = 1 - Phi(a) = 2^P(a): the logarithm of a normal's tail is smooth enough for
// a polynomial of degree 5 (our fit on [0, 6], weighted by what a 16-bit result can show; falling beyond). Off by at
// most 1e-5, and by a quarter of the spacing of fp16. Half the instructions of Abramowitz and Stegun 7.1.26, and one of
// the slow ones (16 a cycle) where that has two.
__device__ inline float quick_gelu(float x) {
  const float size = fabsf(x);
  float p = fmaf(size, -0.00035449457f, 0.0061684139f);
  p = fmaf(p, size, -0.049437225f);
  p = fmaf(p, size, -0.46237022f);
  p = fmaf(p, size, -1.1501307f);
  p = fmaf(p, size, -1.f);
  return fmaf(-size, exp2_of(p), fmaxf(x, 0.f));
}

template <bool kGelu>
__device__ inline float finish(float x) {
  if constexpr (kGelu) return quick_gelu(x);
  return x;
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

}  // namespace cuda
}  // namespace consistentee
