// softmax(scale Q K^T + bias) V of packed sequences of up to 128 tokens on Hopper's own instructions: one program of
// one warpgroup for 64 queries of a sequence and head. All that a program reads comes by the copy engine in boxes of 32
// tokens (a sequence of 14 brings 32, not 128) and leaves room for four other ones (five, with up to 64 tokens): while
// one program waits for its copies another multiplies. With all keys of a sequence at hand the softmax needs no running
// maximum, and the weights go from the sums of the first product into the second as they stand in registers.
//
// Bytes: Q and out once, K and V once for every 64 queries, 6 x 128 a token and head; limited by them from some 16 000
// tokens on, below by latency (one wave of programs up to about 27 sequences of 12 heads).
#include "attention.h"
#include "device.cuh"
#include "hopper.cuh"
#include "pack.cuh"

namespace consistentee {
namespace cuda {

constexpr int kThreads = 128;  // a warpgroup
constexpr int kQueries = 64;   // of a program
constexpr int kBox = 32;       // tokens that one copy brings
constexpr float kLog2E = 1.4426950408889634f;

struct AttentionArgs {
  CUtensorMap qkv;
  AttentionCall call;
};

// What the removal of survivors.cu finds, by a program for each row, which looks at all of them. Everything that is
// read is loaded ahead: by contract none of it is the result of the kernel in front.
__device__ void find_places(const AttentionCall& call, int32_t row, int32_t live) {
  __shared__ int32_t sums[4][kThreads / 32];
  int32_t found[4] = {0, 0, 0, 0};  // rows and tokens that stay in front of this row; of all
#pragma unroll
  for (int i = threadIdx.x; i < kAttentionRemovalRows; i += kThreads) {
    if (i >= live || __ldcg(call.keep + i) == 0) continue;
    const int32_t length = __ldcg(call.cu_seqlens + i + 1) - __ldcg(call.cu_seqlens + i);
    if (i < row) {
      ++found[0];
      found[1] += length;
    }
    ++found[2];
    found[3] += length;
  }
  int32_t start = 0, length = 0, row_id = 0;
  bool stays = false;
  if (row < live) {
    start = __ldcg(call.cu_seqlens + row);
    length = __ldcg(call.cu_seqlens + row + 1) - start;
    row_id = __ldcg(call.row_ids + row);
    stays = __ldcg(call.keep + row) != 0;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    found[i] = __reduce_add_sync(0xffffffffu, found[i]);
    if (threadIdx.x % 32 == 0) sums[i][threadIdx.x / 32] = found[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    found[i] = 0;
#pragma unroll
    for (int warp = 0; warp < kThreads / 32; ++warp) found[i] += sums[i][warp];
  }
  wait_for_kernel_in_front();
#pragma unroll 1
  for (int32_t token = threadIdx.x; token < length; token += kThreads) {
    call.token_dest[start + token] = stays ? found[1] + token : -1;
  }
  if (threadIdx.x != 0) return;
  if (stays) {
    call.out_cu_seqlens[found[0] + 1] = found[1] + length;
    call.out_row_ids[found[0]] = row_id;
  }
  if (row == 0) {
    call.out_cu_seqlens[0] = 0;
    call.out_counts[0] = found[2];
    call.out_counts[1] = found[3];
  }
}

// Shared memory of a program, in boxes of kBox tokens, swizzled.
struct Tiles {
  char *queries, *keys, *values;
  uint64_t *asked, *valued;  // barriers: queries and keys are there; values are
};
// Whom a program serves: queries `first` ... `first` + 63 of a sequence.
struct Asking {
  int32_t head, start, length, first;
};

// A program's queries over keys 0 ... length - 1, of which there is room for kKeys.
template <bool kBfloat16, int kHead, bool kBias, int kKeys>
__device__ __forceinline__ void attend(const AttentionCall& call, const Tiles& at, const Asking& by) {
  constexpr int kTokenBytes = 2 * kHead;
  const int lane = threadIdx.x % 32, quad = lane % 4;
  // This lane has queries lane / 4 of the warp's 16 and 8 further down; keys 8 j + 2 quad and the next, for all j.
  const int32_t query = by.first + static_cast<int32_t>(threadIdx.x) / 32 * 16 + lane / 4;
  float scores[kKeys / 2];  // before they are scaled
  if constexpr (kBias) {
    // While the copies are under way. There is an entry wherever a tile reaches, whoever needs it.
    const float unit = kLog2E / call.scale_log2;
    const auto* const bias = static_cast<const uint16_t*>(call.bias) + 8 * quad;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const auto* const row = bias + (static_cast<int64_t>(by.head) * call.bias_side + query + 8 * h) * call.bias_side;
#pragma unroll
      for (int j = 0; j < kKeys / 8; j += 4) {
        uint4 words = __ldg(reinterpret_cast<const uint4*>(row + 8 * j));
        uint32_t(&four)[4] = reinterpret_cast<uint32_t(&)[4]>(words);
        turn(four, lane);  // from words side by side back to how the product lays them
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float2 two = unpack<kBfloat16>(four[i]);
          scores[4 * (j + i) + 2 * h] = two.x * unit;
          scores[4 * (j + i) + 2 * h + 1] = two.y * unit;
        }
      }
    }
  }
  barrier_wait(at.asked, 0);
  {
    const uint64_t queries = tile_descriptor<kTokenBytes>(at.queries);
    const uint64_t keys = tile_descriptor<kTokenBytes>(at.keys);
    warpgroup_arrive();
#pragma unroll
    for (int i = 0; i < kHead / 16; ++i) {
      multiply<kKeys, kBfloat16>(scores, queries + 2 * i, keys + 2 * i, kBias || i > 0);
    }
    warpgroup_commit();
    warpgroup_wait<0>();
  }
  if (by.length < kKeys) {
#pragma unroll
    for (int i = 0; i < kKeys / 2; ++i) {
      if (i / 4 * 8 + 2 * quad + i % 2 >= by.length) scores[i] = -INFINITY;
    }
  }
  float tops[2] = {-INFINITY, -INFINITY}, totals[2] = {0.f, 0.f};
#pragma unroll
  for (int i = 0; i < kKeys / 2; ++i) tops[i / 2 % 2] = fmaxf(tops[i / 2 % 2], scores[i]);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    tops[h] = fmaxf(tops[h], __shfl_xor_sync(0xffffffffu, tops[h], 1));
    tops[h] = fmaxf(tops[h], __shfl_xor_sync(0xffffffffu, tops[h], 2)) * call.scale_log2;
  }
  uint32_t weights[kKeys / 16][4];
#pragma unroll
  for (int j = 0; j < kKeys / 8; ++j) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float low = exp2_of(fmaf(scores[4 * j + 2 * h], call.scale_log2, -tops[h]));
      const float high = exp2_of(fmaf(scores[4 * j + 2 * h + 1], call.scale_log2, -tops[h]));
      totals[h] += low + high;
      weights[j / 2][j % 2 * 2 + h] = pack<kBfloat16>(low, high);
    }
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    totals[h] += __shfl_xor_sync(0xffffffffu, totals[h], 1);
    totals[h] += __shfl_xor_sync(0xffffffffu, totals[h], 2);
  }

  barrier_wait(at.valued, 0);
  if (by.length < kKeys) {
    // Behind the last token stand another sequence's, or what was there before, of which not even a NaN may come in by
    // a weight of 0.
    auto* const behind = reinterpret_cast<uint4*>(at.values + by.length * kTokenBytes);
    const int32_t chunks = (kKeys - by.length) * (kTokenBytes / 16);
#pragma unroll 1
    for (auto chunk = static_cast<int32_t>(threadIdx.x); chunk < chunks; chunk += kThreads) {
      behind[chunk] = make_uint4(0, 0, 0, 0);
    }
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();
  }
  float sums[kHead / 2];
  {
    const uint64_t values = tile_descriptor<kTokenBytes>(at.values);
    warpgroup_arrive();
#pragma unroll
    for (int i = 0; i < kKeys / 16; ++i) {
      multiply_weights<kHead, kBfloat16>(sums, weights[i], values + kTokenBytes * i, i > 0);
    }
    warpgroup_commit();
    warpgroup_wait<0>();
  }
  auto* const out = static_cast<uint16_t*>(call.out) + by.head * kHead + 8 * quad;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float share = __fdividef(1.f, totals[h]);  // which is about 1 at least, or no number
    uint32_t words[kHead / 8];
#pragma unroll
    for (int j = 0; j < kHead / 8; ++j) {
      words[j] = pack<kBfloat16>(sums[4 * j + 2 * h] * share, sums[4 * j + 2 * h + 1] * share);
    }
#pragma unroll
    for (int part = 0; part < kHead / 32; ++part) {
      uint32_t(&four)[4] = reinterpret_cast<uint32_t(&)[4]>(words[4 * part]);
      turn(four, lane);
      if (query + 8 * h < by.length) {
        *reinterpret_cast<uint4*>(out + (by.start + query + 8 * h) * call.out_stride + 32 * part) =
            reinterpret_cast<const uint4&>(four);
      }
    }
  }
}

// kLongest: tokens of a sequence at most.
template <bool kBfloat16, int kHead, bool kBias, int kLongest>
__global__ void __launch_bounds__(kThreads, kLongest == 64 ? 6 : 5)
    short_attention_kernel(const __grid_constant__ AttentionArgs args) {
  extern __shared__ char memory[];
  __shared__ uint64_t barriers[2];
  constexpr int kParts = kLongest / kQueries, kTokenBytes = 2 * kHead;
  const AttentionCall& call = args.call;
  // Heads of a sequence side by side, as their queries, keys and values are in memory.
  const auto heads = static_cast<uint32_t>(call.heads) + (call.keep != nullptr);
  const auto head = static_cast<int32_t>(blockIdx.x % heads), asked_of = static_cast<int32_t>(blockIdx.x / heads);
  const int32_t row = asked_of / kParts, part = asked_of % kParts;
  const int32_t live = __ldcg(call.counts);
  if (head == call.heads) {  // behind the last head, for a row
    if (part != 0) return wait_for_kernel_in_front();
    return find_places(call, row, live);
  }
  const int32_t start = __ldcg(call.cu_seqlens + row);
  // No more than there is room for, whatever stands there.
  const int32_t length = min(__ldcg(call.cu_seqlens + row + 1) - start, kLongest);
  // An offset, not a rounded pointer, of which the compiler would no longer know that it is shared memory.
  Tiles at;
  at.queries = memory + (-shared_address(memory) & 1023);
  at.keys = at.queries + kQueries * kTokenBytes;
  at.values = at.keys + kLongest * kTokenBytes;
  at.asked = barriers;
  at.valued = barriers + 1;
  if (threadIdx.x == 0) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&args.qkv) : "memory");
    barrier_init(at.asked, 1);
    barrier_init(at.valued, 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  wait_for_kernel_in_front();
  const Asking by{head, start, length, part * kQueries};
  const int32_t asked = min(length - by.first, kQueries);
  if (row >= live || asked <= 0) return;
  if (threadIdx.x % 32 == 0) {
    // A box a warp at a time: one thread alone would be half a microsecond at it.
    const int32_t of_queries = (asked + kBox - 1) / kBox, boxes = (length + kBox - 1) / kBox;
    if (threadIdx.x == 0) {
      barrier_expect(at.asked, (of_queries + boxes) * kBox * kTokenBytes);
      barrier_expect(at.valued, boxes * kBox * kTokenBytes);
    }
    const int32_t hidden = static_cast<int32_t>(call.heads) * kHead;
#pragma unroll 1
    for (auto i = static_cast<int32_t>(threadIdx.x) / 32; i < of_queries + 2 * boxes; i += kThreads / 32) {
      char* to = at.queries;
      int32_t column = head * kHead, token = start + by.first, box = i;
      if (i >= of_queries) {
        const bool value = i >= of_queries + boxes;
        to = value ? at.values : at.keys;
        column += value ? 2 * hidden : hidden;
        token = start;
        box -= of_queries + (value ? boxes : 0);
      }
      copy_tile(to + box * kBox * kTokenBytes, &args.qkv, to == at.values ? at.valued : at.asked, column,
                token + box * kBox);
    }
  }
  if (length <= 32) {
    attend<kBfloat16, kHead, kBias, 32>(call, at, by);
  } else if (kLongest == 64 || length <= 64) {
    attend<kBfloat16, kHead, kBias, 64>(call, at, by);
  } else if constexpr (kLongest == 128) {
    attend<kBfloat16, kHead, kBias, 128>(call, at, by);
  }
}

template <bool kBfloat16, int kHead, bool kBias, int kLongest>
const char* attend_all(const AttentionArgs& args) {
  const AttentionCall& call = args.call;
  const auto kernel = short_attention_kernel<kBfloat16, kHead, kBias, kLongest>;
  constexpr int64_t kShared = (kQueries + 2 * kLongest) * 2 * kHead + 1024;
  const int64_t programs = call.rows * (kLongest / kQueries) * (call.heads + (call.keep != nullptr));
  size_t shared = 0;
  if (const char* text = even_share(reinterpret_cast<const void*>(kernel), programs, kShared, &shared)) return text;
  return launch_early(kernel, static_cast<unsigned>(programs), kThreads, shared, call.stream, args);
}
template <bool kBfloat16, int kHead, bool kBias>
const char* attend_all(const AttentionArgs& args) {
  return args.call.longest <= 64 ? attend_all<kBfloat16, kHead, kBias, 64>(args)
                                 : attend_all<kBfloat16, kHead, kBias, 128>(args);
}
template <bool kBfloat16>
const char* attend_all(const AttentionArgs& args) {
  if (args.call.head_dim == 32) return attend_all<kBfloat16, 32, false>(args);
  return args.call.bias == nullptr ? attend_all<kBfloat16, 64, false>(args) : attend_all<kBfloat16, 64, true>(args);
}

}  // namespace cuda
}  // namespace consistentee

const char* consistentee_attention(const AttentionCall* call) {
  using namespace consistentee::cuda;
  if (call->rows == 0 || call->heads == 0) return nullptr;
  if (call->longest > kAttentionLongest) return "sequences of that length are not served";
  if (call->keep != nullptr && call->rows > kAttentionRemovalRows) return "a removal of so many rows is not served";
  if (call->head_dim != 64 && (call->head_dim != 32 || call->bias != nullptr)) {
    return "heads of that size are not served";
  }
  AttentionArgs args;
  args.call = *call;
  if (const char* text = encode_map(&args.qkv, call->qkv, call->tokens, 3 * call->heads * call->head_dim,
                                    call->qkv_stride, kBox, call->bfloat16 != 0, static_cast<int>(call->head_dim))) {
    return text;
  }
  return call->bfloat16 ? attend_all<true>(args) : attend_all<false>(args);
}
