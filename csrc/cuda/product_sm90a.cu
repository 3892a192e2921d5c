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
// On path 4, half of the last tile's sums handed through the ring to the other warpgroup, which has nothing left to do,
// so that both store it: no gain at 128 and 512 rows of 128 tokens, 1 to 2 % more at 16 and 32.
// Pairs of programs (clusters) that bring x for each other: 2 us more for a launch, and a pair waits for its slower
// half at every tile. Pairs that bring W for each other: 1 % less for a pass of 512 x 128 tokens, nothing at 32 to 128,
// 3 % more at 16 (and a third more with a release of cluster scope at each step, which waits for all stores of its
// thread). Putting the sums of shared tiles of path 1 together here: that takes what it saves. A tile of
// 128 x 144: 1 us less for QKV of 1 024 rows, and its code costs all others as much. One of 128 x 240, a round less
// for QKV of 1 025 to 1 664 rows: 2 % of a pass at 10 x 128 tokens, 1 % at 12, nothing at 14 and 16. The next
// product's weights brought to L2 meanwhile: no gain at 128 tokens, 1 to 5 % more from 1 024 on. A product's own
// weights brought while the kernel in front still runs: to L2, no gain; into the ring, 3 to 9 % slower at 128 to
// 1 024 tokens, and the count read that early gains nothing.
#include <type_traits>

#include "device.cuh"
#include "hopper.cuh"
#include "product.h"
#include "product_choice.cuh"
#include "product_store.cuh"
#include "product_tiles.cuh"

namespace consistentee {
namespace cuda {

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

// `steps` steps of K as they come through the ring, from step `first` of all that it has seen; where warpgroups take
// turns along K, every second one of them. `sums`: of kHalves blocks of 64 rows, from block `block` of the tile on.
//
// Returns with the last product in flight: the stage that it reads, for the caller to wait and to say that it is empty,
// or -1 where there was no step. Therefore inlined: of an array handed over in memory wgmma can make nothing.
template <class T, bool kBfloat16, int kHalves>
__device__ __forceinline__ int32_t multiply_steps(const Ring& ring, uint32_t first, int32_t steps, int32_t block,
                                                  bool signals, float (&sums)[kHalves][T::columns / 2]) {
  static_assert(kHalves == (T::turns ? 2 : 1));
  int32_t held = -1;
  int stage = static_cast<int>(first % T::stages);
  uint32_t phase = first / T::stages & 1;
#pragma unroll 1
  for (int32_t k = 0; k < steps; k += T::split ? 2 : 1) {
    barrier_wait(ring.full + stage, phase);
    const char* const tile = ring.data + stage * T::bytes;
    uint64_t x[kHalves];
#pragma unroll
    for (int h = 0; h < kHalves; ++h) x[h] = tile_descriptor(tile + (block + h) * kBoxRows * kStep * 2);
    const uint64_t weight = tile_descriptor(tile + T::x_bytes);
    warpgroup_arrive();
#pragma unroll
    for (int i = 0; i < kStep / 16; ++i) {
#pragma unroll
      for (int h = 0; h < kHalves; ++h) {
        multiply<T::columns, kBfloat16>(sums[h], x[h] + 2 * i, weight + 2 * i, i > 0 || held >= 0);
      }
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
  return held;
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
    float sums[1][T::columns / 2];  // the first product writes them
    const float bias = column < T::columns ? bias_at<kBfloat16>(args, n * T::columns + column) : 0.f;
    const int32_t skipped = T::split ? group : 0;
    const int32_t held =
        multiply_steps<T, kBfloat16>(ring, base + skipped, steps - skipped, T::split ? 0 : group, signals, sums);
    warpgroup_wait<0>();
    if (held >= 0 && signals) barrier_arrive(ring.empty + held);
    base += steps;
    if (column < T::columns) biases[column] = bias;
    if constexpr (T::split) {
      if (held < 0) {  // K has one step, which is the other warpgroup's
#pragma unroll
        for (int i = 0; i < T::columns / 2; ++i) sums[0][i] = 0.f;
      }
      const int thread = threadIdx.x % kWarpgroup;
      if (group == 1) {
#pragma unroll
        for (int i = 0; i < T::columns / 2; ++i) second[i * kWarpgroup + thread] = sums[0][i];
      }
      named_barrier(1, 2 * kWarpgroup);
      if (group == 0) {
#pragma unroll
        for (int i = 0; i < T::columns / 2; ++i) sums[0][i] += second[i * kWarpgroup + thread];
        const int32_t row = m * T::rows, output = n * T::columns;
        if (kPartials && plan.shares > 1) {
          store_partial<T::columns>(args, plan, sums[0], biases, row, output, share);
        } else if (kPartials || plan.shares == 1 || join_shares(args, plan, item, sums[0], last)) {
          store_rows<T::columns, kBfloat16, kGelu>(args, sums[0], biases, row, plan.live, output);
        }
      }
      named_barrier(2, 2 * kWarpgroup);
    } else {
      // One barrier is enough: who writes these biases again has met the other warpgroup at the next tile's.
      named_barrier(1, 2 * kWarpgroup);
      const int32_t row = m * T::rows + group * kBoxRows, output = n * T::columns;
      if (kPartials && plan.shares > 1) {
        store_partial<T::columns>(args, plan, sums[0], biases, row, output, share);
      } else {
        store_rows<T::columns, kBfloat16, kGelu>(args, sums[0], biases, row, plan.live, output);
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
  const auto steps = static_cast<int32_t>(plan.steps);
  uint32_t base = group * steps;
#pragma unroll 1
  for (uint32_t item = blockIdx.x + group * gridDim.x; item < plan.items; item += 2 * gridDim.x) {
    int32_t m, n;
    plan.place(item, m, n);
    float sums[2][T::columns / 2];  // rows 0 to 63, and 64 to 127
    const int32_t column = n * T::columns + thread;
    const bool twice = thread < T::columns - kWarpgroup;  // it fetches the bias of two columns
    const float bias = bias_at<kBfloat16>(args, column);
    const float more_bias = twice ? bias_at<kBfloat16>(args, column + kWarpgroup) : 0.f;
    if (base > 0) named_barrier(4 + group, 2 * kWarpgroup);
    const int32_t held = multiply_steps<T, kBfloat16>(ring, base, steps, 0, signals, sums);
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
      store_rows<T::columns, kBfloat16, kGelu>(args, sums[0], biases, row, plan.live, n * T::columns);
#pragma unroll
      for (int i = 0; i < T::columns / 2; ++i) sums[0][i] = sums[1][i];
    }
    biases += turned ? -T::columns : T::columns;
    turned = !turned;
  }
}

template <bool kBfloat16, bool kGelu, bool kPartials, int kTiles>
__global__ void __launch_bounds__(kProductThreads, 1) product_kernel(const __grid_constant__ ProductArgs args) {
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
}

namespace {

const char* programs_of_device(uint32_t* programs) {
  int count = 0;
  if (const char* text = count_multiprocessors(&count)) return text;
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
