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

// Sum of the values of the threads below this one, plus *carry, to which the block's total is added. Every thread of
// the block takes part.
template <class V, int Threads = kScanThreads>
__device__ V scan_threads(V own, V* carry) {
  __shared__ V warp_totals[Threads / 32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  V sum = own;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const V below = shuffle_up(sum, step);
    if (lane >= step) sum = sum + below;
  }
  if (lane == 31) warp_totals[warp] = sum;
  __syncthreads();
  V before = *carry;
  V total = *carry;
  for (int w = 0; w < Threads / 32; ++w) {
    if (w < warp) before = before + warp_totals[w];
    total = total + warp_totals[w];
  }
  *carry = total;
  __syncthreads();  // the next use of warp_totals
  return before + (sum - own);  // inclusive minus own: every V here is a group of integers under +
}

// visit(i, before) sees, for every i below `count`, the sum of value(k) over k < i. V is int32_t or Pair. Returns
// the total to every thread.
template <class V, class Value, class Visit>
__device__ V block_scan(int64_t count, V zero, Value value, Visit visit) {
  V carry = zero;
  for (int64_t base = 0; base < count; base += kScanThreads) {
    const int64_t i = base + threadIdx.x;
    const V before = scan_threads<V>(i < count ? value(i) : zero, &carry);
    if (i < count) visit(i, before);
  }
  return carry;
}

}  // namespace cuda
}  // namespace consistentee
