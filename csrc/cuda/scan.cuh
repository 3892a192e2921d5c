// One block's prefix sum over any number of items. Batches are thousands of rows at most: one block takes microseconds
// and needs neither scratch nor a second launch.
#pragma once
#include "device.cuh"

namespace consistentee {
namespace cuda {

constexpr int kScanThreads = 1024;

__device__ inline int32_t shuffle_up(int32_t x, int step) { return __shfl_up_sync(0xffffffffu, x, step); }

struct Pair {
  int32_t rows, tokens;
};
__device__ inline Pair operator+(Pair a, Pair b) { return {a.rows + b.rows, a.tokens + b.tokens}; }
__device__ inline Pair operator-(Pair a, Pair b) { return {a.rows - b.rows, a.tokens - b.tokens}; }
__device__ inline Pair shuffle_up(Pair x, int step) { return {shuffle_up(x.rows, step), shuffle_up(x.tokens, step)}; }

// visit(i, before) sees, for every i below `count`, the sum of value(k) over k < i. V is int32_t or Pair. Returns
// the total to every thread.
template <class V, class Value, class Visit>
__device__ V block_scan(int64_t count, V zero, Value value, Visit visit) {
  __shared__ V warp_totals[kScanThreads / 32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  V carry = zero;
  for (int64_t base = 0; base < count; base += kScanThreads) {
    const int64_t i = base + threadIdx.x;
    const V own = i < count ? value(i) : zero;
    V sum = own;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const V below = shuffle_up(sum, step);
      if (lane >= step) sum = sum + below;
    }
    if (lane == 31) warp_totals[warp] = sum;
    __syncthreads();
    V before = carry;
    V total = carry;
    for (int w = 0; w < kScanThreads / 32; ++w) {
      if (w < warp) before = before + warp_totals[w];
      total = total + warp_totals[w];
    }
    // Inclusive minus own: every V here is a group of integers under +.
    if (i < count) visit(i, before + (sum - own));
    carry = total;
    __syncthreads();
  }
  return carry;
}

}  // namespace cuda
}  // namespace consistentee
