// step_rows_ on CUDA: one block, limited by latency (some KB move). A round decides about as many rows as there are
// threads: z by eight lanes a row, then one thread a row, then one scan gives each of those that go on its place in
// out_order and the place of what is owed to it. The lists of owed positions are long and few, or short and many: all
// threads share the round's entries, each finding its row by search. Few rows have one warp, whose barriers cost nothing,
// more a block of kFew threads; for many, a wide block does with one round what would take four.
//
// Only the policy's bias is loaded before the kernel in front has ended: the lists may come from that very kernel.
#include "scan.cuh"

namespace consistentee {
namespace cuda {

constexpr int kWarp = 32, kFew = 256, kMany = 1024;  // threads, and so rows of one round
constexpr int64_t kWarpRows = 4;                     // up to as many a warp has room to add their partial sums at once
constexpr int kLanes = 8;                // of one row's sum: a number of its own, so that no batch changes a row's z

// What the rows in front have taken: places in out_order, and places in the owed lists. Sums of lengths that nobody
// checked must not wrap.
struct Taken {
  int32_t rows;
  int64_t owed;
};
__device__ inline Taken operator+(Taken a, Taken b) { return {a.rows + b.rows, a.owed + b.owed}; }
__device__ inline Taken operator-(Taken a, Taken b) { return {a.rows - b.rows, a.owed - b.owed}; }
__device__ inline Taken shuffle_up(Taken x, int step) {
  return {__shfl_up_sync(0xffffffffu, x.rows, step),
          static_cast<int64_t>(__shfl_up_sync(0xffffffffu, static_cast<long long>(x.owed), step))};
}

__device__ inline float bias_of(const StepRowsArgs& args) {
  switch (args.b2_dtype) {
    case DType::f64: return static_cast<float>(*reinterpret_cast<const double*>(args.b2));
    case DType::f16: return widen(*reinterpret_cast<const __half*>(args.b2));
    case DType::bf16: return widen(*reinterpret_cast<const __nv_bfloat16*>(args.b2));
    default: return *reinterpret_cast<const float*>(args.b2);
  }
}

// The live row with this place in order; -1 where there is none, or no such row.
__device__ inline int32_t row_at(const StepRowsArgs& args, int64_t place, int64_t live) {
  const int32_t row = place < args.cap_rows ? args.order[place] : -1;  // before anybody knows how many live
  return place < live && row >= 0 && row < args.cap_rows ? row : -1;
}

// sums[i]: of the partial sums of the round's i-th row. The CPU adds in the same order.
template <int Threads>
__device__ void add_partials(const StepRowsArgs& args, int64_t first, int64_t live, float* sums) {
  const int lane = threadIdx.x % kLanes;
  for (int64_t base = 0; base < Threads && first + base < live; base += Threads / kLanes) {
    const int64_t i = base + threadIdx.x / kLanes;
    const int32_t row = row_at(args, first + i, live);
    float sum = 0.0f;
    if (row >= 0) {
      const float* parts = args.partial + row * args.splits;
#pragma unroll 8
      for (int64_t s = lane; s < args.splits; s += kLanes) sum += parts[s];
    }
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    if (lane == 0) sums[i] = sum;
  }
  __syncthreads();
}

template <int Threads>
__global__ void __launch_bounds__(Threads) step_rows_kernel(const __grid_constant__ StepRowsArgs args) {
  __shared__ float sums[Threads];
  __shared__ int64_t starts[Threads];  // of the round's rows in the owed lists
  __shared__ int32_t ids[Threads];     // and these rows,
  __shared__ int32_t marks[Threads];   // and the first position owed to each
  const float bias = args.kind == kDecide ? bias_of(args) : 0.0f;
  wait_for_kernel_in_front();
  const int thread = static_cast<int>(threadIdx.x);
  const int32_t count = args.counts[0];
  const int64_t live = count < 0 ? 0 : count > args.cap_rows ? args.cap_rows : count;
  const int64_t held = args.blocks * args.block_size;  // positions of one row

  Taken taken{0, 0};
  for (int64_t first = 0; first < live; first += Threads) {
    const int32_t row = row_at(args, first + thread, live);
    bool stays = row >= 0 && args.kind != kLeave;
    int32_t position = 0, mark = 0;
    if (stays && args.next_layer > 0) {
      position = args.positions[row];
      mark = args.watermarks[row * args.layers + args.next_layer - 1];
    }
    if (args.kind == kLeave && row >= 0) {
      args.exit_layers[row] = args.layer;
      args.exit_probs[row] = 1.0f;
    } else if (args.kind == kDecide) {
      int32_t script = 0, least = 0, most = 0;
      float threshold = 0.0f;
      if (row >= 0) {
        script = args.script[row], least = args.min_depth[row], most = args.max_depth[row];
        threshold = args.threshold_logit[row];
      }
      add_partials<Threads>(args, first, live, sums);
      if (row >= 0) {
        const float z = sums[thread] + bias;
        const bool forced = most <= args.layer;
        const bool asked = script > 0 ? script <= args.layer : z > threshold;
        if ((asked || forced) && least <= args.layer) {
          stays = false;
          args.exit_layers[row] = args.layer;
          args.exit_probs[row] = forced ? 1.0f : 1.0f / (1.0f + expf(-z));
        }
      }
    }

    int64_t owed = 0;
    if (stays && args.next_layer > 0) {
      args.watermarks[row * args.layers + args.next_layer - 1] = position + 1;
      mark = mark < 0 ? 0 : mark;
      const int64_t end = position < held ? position : held;
      owed = end > mark ? end - mark : 0;
    }
    const int64_t round_start = taken.owed;
    const Taken before = scan_threads<Taken, Threads>(Taken{stays ? 1 : 0, owed}, &taken);
    if (stays) args.out_order[before.rows] = row;

    const int64_t end = taken.owed < args.cap_owed ? taken.owed : args.cap_owed;
    if (round_start >= end) continue;  // the same for every thread
    starts[thread] = before.owed;
    ids[thread] = row;
    marks[thread] = mark;
    __syncthreads();
    const int64_t in_round = live - first < Threads ? live - first : Threads;
    for (int64_t at = round_start + thread; at < end; at += Threads) {
      // The last start at or before it: never that of a row to which nothing is owed.
      const int64_t i = last_at_or_before(in_round, at, [&](int64_t j) { return starts[j]; });
      const int32_t p = marks[i] + static_cast<int32_t>(at - starts[i]);
      const int32_t block = args.block_table[ids[i] * args.blocks + p / args.block_size];
      args.owed_slots[at] = block * args.block_size + p % args.block_size;
      args.owed_positions[at] = p;
    }
    // The next round writes the shared arrays behind the barriers of its scan: everybody has read them by then.
  }
  if (thread == 0) {
    const int64_t listed = taken.owed < args.cap_owed ? taken.owed : args.cap_owed;
    args.out_counts[0] = taken.rows;
    args.out_counts[1] = static_cast<int32_t>(listed);
    if (args.settled != nullptr) *args.settled += listed;
  }
}

const char* step_rows(const StepRowsArgs& args, void* stream) {
  if (args.cap_rows <= kWarpRows) return launch_early(step_rows_kernel<kWarp>, 1, kWarp, 0, stream, args);
  if (args.cap_rows <= kFew) return launch_early(step_rows_kernel<kFew>, 1, kFew, 0, stream, args);
  return launch_early(step_rows_kernel<kMany>, 1, kMany, 0, stream, args);
}

}  // namespace cuda
}  // namespace consistentee
