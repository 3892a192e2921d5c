// lead_attention on CUDA: one warp for each (query, head), lanes along the head, online softmax over the keys.
// Limited by the latency of one warp reduction a key; no shared memory, any length, head sizes up to 256. Plain on
// purpose: it is the always-available version.
#include "scan.cuh"

namespace consistentee {
namespace cuda {

constexpr int kWarps = 4;

// Which sequence and position query `q` of the launch is; false where there is no such token (an entry of rows out of
// range, or more queries announced than there are).
__device__ inline bool locate_query(const AttentionArgs& args, int64_t q, int64_t* sequence, int64_t* position) {
  int64_t served = q, place = 0;
  if (args.part == kFirst && q >= args.n_rows) return false;
  if (args.part != kFirst && (args.part == kOthers || q >= args.n_rows)) {
    const int64_t other = args.part == kAll ? q - args.n_rows : q;
    const auto start = [&](int64_t k) {
      return args.offsets != nullptr ? static_cast<int64_t>(args.offsets[k]) : args.cu_seqlens[k] - k;
    };
    served = last_at_or_before(args.n_rows, other, start);
    place = other - start(served) + 1;
  }
  *sequence = args.rows != nullptr ? args.rows[served] : served;
  *position = place;
  return *sequence >= 0 && *sequence < args.batch &&
         place < args.cu_seqlens[*sequence + 1] - args.cu_seqlens[*sequence];
}

template <class A>
__device__ inline A bias_at(const AttentionArgs& args, int64_t i) {
  switch (args.bias_dtype) {
    case DType::f64: return static_cast<A>(reinterpret_cast<const double*>(args.bias)[i]);
    case DType::f16: return static_cast<A>(widen(reinterpret_cast<const __half*>(args.bias)[i]));
    case DType::bf16: return static_cast<A>(widen(reinterpret_cast<const __nv_bfloat16*>(args.bias)[i]));
    default: return static_cast<A>(reinterpret_cast<const float*>(args.bias)[i]);
  }
}

template <class T, int PerLane>
__global__ void attention_kernel(AttentionArgs args) {
  using A = wide_t<T>;
  const int64_t unit = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (unit >= args.n_queries * args.num_heads) return;
  const int lane = threadIdx.x % 32;
  const int64_t q = unit / args.num_heads, head = unit % args.num_heads, d = args.head_dim, column = head * d;
  T* out = reinterpret_cast<T*>(args.out) + q * args.num_heads * d + column;

  int64_t sequence, position;
  if (!locate_query(args, q, &sequence, &position)) {
    for (int64_t c = lane; c < d; c += 32) narrow(out + c, A(0));
    return;
  }
  const int64_t others = args.batch + args.cu_seqlens[sequence] - sequence;
  const int64_t length = args.cu_seqlens[sequence + 1] - args.cu_seqlens[sequence];
  const auto row_at = [&](int64_t p) { return p == 0 ? sequence : others + p - 1; };
  const T* query = reinterpret_cast<const T*>(args.query) + row_at(position) * args.query_stride + column;

  A own[PerLane], sum[PerLane];
#pragma unroll
  for (int i = 0; i < PerLane; ++i) {
    const int64_t c = i * 32 + lane;
    own[i] = c < d ? widen(query[c]) * static_cast<A>(args.scale) : A(0);
    sum[i] = A(0);
  }
  A top = A(-1e30), weight_sum = A(0);
  for (int64_t p = 0; p < length; ++p) {
    const int64_t row = row_at(p);
    const T* key = reinterpret_cast<const T*>(args.key) + row * args.key_stride + column;
    A score = A(0);
#pragma unroll
    for (int i = 0; i < PerLane; ++i) {
      const int64_t c = i * 32 + lane;
      if (c < d) score += own[i] * widen(key[c]);
    }
    score = warp_sum(score);
    if (args.bias != nullptr) {
      // Past the table's reach (the CPU refuses this) the nearest entry stands in.
      int64_t t = p - position + args.bias_span - 1;
      t = t < 0 ? 0 : t > 2 * args.bias_span - 2 ? 2 * args.bias_span - 2 : t;
      score += bias_at<A>(args, head * (2 * args.bias_span - 1) + t);
    }
    const A higher = score > top ? score : top;
    const A shrink = exp_of(top - higher), weight = exp_of(score - higher);
    top = higher;
    weight_sum = weight_sum * shrink + weight;
    const T* value = reinterpret_cast<const T*>(args.value) + row * args.value_stride + column;
#pragma unroll
    for (int i = 0; i < PerLane; ++i) {
      const int64_t c = i * 32 + lane;
      if (c < d) sum[i] = sum[i] * shrink + weight * widen(value[c]);
    }
  }
#pragma unroll
  for (int i = 0; i < PerLane; ++i) {
    const int64_t c = i * 32 + lane;
    if (c < d) narrow(out + c, sum[i] / weight_sum);
  }
}

const char* attention(const AttentionArgs& args, void* stream) {
  const int64_t units = args.n_queries * args.num_heads;
  if (units == 0 || args.head_dim == 0) return nullptr;
  if (args.head_dim > 256) return "lead_attention serves heads of up to 256, use the torch twin for wider ones";
  return with_dtype(args.dtype, [&](auto* null) {
    using T = std::remove_cv_t<std::remove_pointer_t<decltype(null)>>;
    const unsigned blocks = blocks_for(units, kWarps);
    const cudaStream_t s = as_stream(stream);
    if (args.head_dim <= 32) {
      attention_kernel<T, 1><<<blocks, kWarps * 32, 0, s>>>(args);
    } else if (args.head_dim <= 64) {
      attention_kernel<T, 2><<<blocks, kWarps * 32, 0, s>>>(args);
    } else if (args.head_dim <= 128) {
      attention_kernel<T, 4><<<blocks, kWarps * 32, 0, s>>>(args);
    } else {
      attention_kernel<T, 8><<<blocks, kWarps * 32, 0, s>>>(args);
    }
    return launch_error();
  });
}

__global__ void row_offsets_kernel(AttentionArgs args, int32_t* offsets) {
  const int32_t total = block_scan<int32_t>(
      args.n_rows, 0,
      [&](int64_t i) {
        const int32_t b = args.rows[i];
        return b >= 0 && b < args.batch ? args.cu_seqlens[b + 1] - args.cu_seqlens[b] - 1 : 0;
      },
      [&](int64_t i, int32_t before) { offsets[i] = before; });
  if (threadIdx.x == 0) offsets[args.n_rows] = total;
}

const char* row_offsets(const AttentionArgs& args, int32_t* offsets, void* stream) {
  row_offsets_kernel<<<1, kScanThreads, 0, as_stream(stream)>>>(args, offsets);
  return launch_error();
}

}  // namespace cuda
}  // namespace consistentee
