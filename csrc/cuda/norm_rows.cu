// LayerNorm(x + residual) of rows in 16 bit, a warp a row: all of it is in registers once it has come, 16 bytes a lane
// at a time, and 4 096 rows of 768 are there at once, so that nobody waits for a second wave. Limited by bytes: two
// rows in, one out, from L2 up to some 8 000 rows. Wider rows need more registers than that leaves.
#include "device.cuh"
#include "norm_rows.h"
#include "pack.cuh"

namespace consistentee {
namespace cuda {

constexpr int kMostWarps = 8;
constexpr int64_t kWidest = 768;

template <int kVectors>
__device__ __forceinline__ void load_row(uint4 (&words)[kVectors], const void* rows, int64_t offset,
                                         const bool (&here)[kVectors], int lane) {
  const auto* const row = reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(rows) + offset) + lane;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) words[i] = here[i] ? __ldcg(row + 32 * i) : make_uint4(0, 0, 0, 0);
}

template <bool kBfloat16, int kVectors>
__device__ __forceinline__ void add_row(float (&value)[kVectors][8], const uint4 (&words)[kVectors]) {
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const uint32_t(&four)[4] = reinterpret_cast<const uint32_t(&)[4]>(words[i]);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const float2 two = unpack<kBfloat16>(four[k]);
      value[i][2 * k] += two.x;
      value[i][2 * k + 1] += two.y;
    }
  }
}

// Partial sums of a row, one after the other: together they would need registers that rows at once need more.
template <int kVectors>
__device__ __forceinline__ void add_sums(float (&value)[kVectors][8], const float4* sums, int32_t shares,
                                         int32_t vectors, const bool (&here)[kVectors]) {
#pragma unroll 1
  for (int32_t share = 0; share < shares; ++share, sums += 2 * vectors) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (!here[i]) continue;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float4 four = __ldcg(sums + 64 * i + half);
        value[i][4 * half] += four.x;
        value[i][4 * half + 1] += four.y;
        value[i][4 * half + 2] += four.z;
        value[i][4 * half + 3] += four.w;
      }
    }
  }
}

// kVectors: of 8 numbers that a lane has of a row. Four programs a multiprocessor leave 64 registers to a lane.
template <bool kBfloat16, int kVectors>
__global__ void __launch_bounds__(32 * kMostWarps, 4) add_norm_rows_kernel(NormRowsCall call) {
  __shared__ uint4 affine[2][32 * kVectors];  // weight and bias
  const int lane = threadIdx.x % 32;
  // Neighbours are in different programs: where few rows are live, all multiprocessors have some.
  const auto row = static_cast<int32_t>(threadIdx.x / 32 * gridDim.x + blockIdx.x);
  const auto vectors = static_cast<int32_t>(call.hidden / 8);
  const int32_t live = min(__ldcg(call.live), static_cast<int32_t>(call.capacity));
  int32_t dest = row;
  if (call.dest != nullptr && call.settled && row < live) dest = __ldcg(call.dest + row);
  for (int32_t i = threadIdx.x; i < vectors; i += blockDim.x) {
    affine[0][i] = __ldg(static_cast<const uint4*>(call.weight) + i);
    affine[1][i] = __ldg(static_cast<const uint4*>(call.bias) + i);
  }
  __syncthreads();
  wait_for_kernel_in_front();
  if (row >= live) return;
  if (call.dest != nullptr && !call.settled) dest = __ldcg(call.dest + row);
  if (dest < 0) return;

  bool here[kVectors];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) here[i] = lane + 32 * i < vectors;
  const int32_t shares = call.sums == nullptr ? 0 : live <= call.four ? 4 : live <= call.two ? 2 : 0;
  uint4 residual[kVectors];
  load_row(residual, call.residual, row * call.residual_stride, here, lane);
  float value[kVectors][8] = {};
  if (shares == 0) {
    uint4 x[kVectors];
    load_row(x, call.x, row * call.x_stride, here, lane);
    add_row<kBfloat16>(value, x);
  } else {
    const float* const sums = call.sums + static_cast<int64_t>(row) * shares * call.hidden;
    add_sums(value, reinterpret_cast<const float4*>(sums) + 2 * lane, shares, vectors, here);
  }
  add_row<kBfloat16>(value, residual);

  float total = 0.f;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
#pragma unroll
    for (int k = 0; k < 8; ++k) total += value[i][k];
  }
  const float mean = warp_sum(total) / static_cast<float>(call.hidden);
  float squares = 0.f;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      value[i][k] = here[i] ? value[i][k] - mean : 0.f;
      squares = fmaf(value[i][k], value[i][k], squares);
    }
  }
  const float scale = 1.f / sqrtf(warp_sum(squares) / static_cast<float>(call.hidden) + call.eps);
  auto* const out = reinterpret_cast<uint4*>(static_cast<uint16_t*>(call.out) + dest * call.out_stride) + lane;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    if (!here[i]) continue;
    const uint32_t(&weight)[4] = reinterpret_cast<const uint32_t(&)[4]>(affine[0][lane + 32 * i]);
    const uint32_t(&bias)[4] = reinterpret_cast<const uint32_t(&)[4]>(affine[1][lane + 32 * i]);
    uint4 words;
    uint32_t(&four)[4] = reinterpret_cast<uint32_t(&)[4]>(words);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const float2 by = unpack<kBfloat16>(weight[k]), plus = unpack<kBfloat16>(bias[k]);
      four[k] = pack<kBfloat16>(fmaf(value[i][2 * k] * scale, by.x, plus.x),
                                fmaf(value[i][2 * k + 1] * scale, by.y, plus.y));
    }
    out[32 * i] = words;
  }
}

template <bool kBfloat16, int kVectors>
const char* add_norm_rows(const NormRowsCall& call) {
  // A multiprocessor has two programs of as few rows as will do, before they have eight.
  int multiprocessors = 0, warps = 1;
  if (const char* text = count_multiprocessors(&multiprocessors)) return text;
  while (warps < kMostWarps && call.capacity > int64_t{2} * multiprocessors * warps) warps *= 2;
  const auto kernel = add_norm_rows_kernel<kBfloat16, kVectors>;
  const unsigned programs = blocks_for(call.capacity, warps);
  size_t shared = 0;
  if (const char* text = even_share(reinterpret_cast<const void*>(kernel), programs, 0, &shared)) return text;
  return launch_early(kernel, programs, 32 * warps, shared, call.stream, call);
}
template <bool kBfloat16>
const char* add_norm_rows(const NormRowsCall& call) {
  switch ((call.hidden + 255) / 256) {
    case 1: return add_norm_rows<kBfloat16, 1>(call);
    case 2: return add_norm_rows<kBfloat16, 2>(call);
    default: return add_norm_rows<kBfloat16, 3>(call);
  }
}

}  // namespace cuda
}  // namespace consistentee

const char* consistentee_norm_rows(const NormRowsCall* call) {
  using namespace consistentee::cuda;
  if (call->capacity == 0) return nullptr;
  if (call->hidden % 8 != 0 || call->hidden < 8 || call->hidden > kWidest) return "rows of that width are not served";
  return call->bfloat16 ? add_norm_rows<true>(*call) : add_norm_rows<false>(*call);
}
