// CPU backend of lead_attention: checks of values, the plan of a call, work sharing. The arithmetic is in
// simd/attention.h. Limited by arithmetic: 4 * length^2 * hidden operations for each sequence.
#include <cstring>

#include "backends.h"
#include "fail.h"
#include "parallel.h"
#include "simd/table.h"

namespace consistentee {

// A parallel region costs a few microseconds; below this many multiply-adds one thread is done sooner.
static constexpr int64_t kParallelWork = 80 * 1000;

static int64_t length_of(const AttentionArgs& args, int64_t served) {
  const int64_t b = args.rows != nullptr ? args.rows[served] : served;
  return args.cu_seqlens[b + 1] - args.cu_seqlens[b];
}

void Cpu::row_offsets(const AttentionArgs& args, int32_t* offsets) const {
  const int32_t* cu = args.cu_seqlens;
  EE_CHECK(cu[0] == 0 && cu[args.batch] <= args.total, "cu_seqlens must start with 0 and end within the rows of query (",
           args.total, "), got ", cu[0], " and ", cu[args.batch]);
  for (int64_t i = 0; i < args.batch; ++i) {
    EE_CHECK(cu[i + 1] > cu[i], "cu_seqlens must give every sequence at least 1 token, got ", cu[i + 1] - cu[i],
             " for sequence ", i);
  }
  if (args.rows != nullptr) {
    for (int64_t r = 0; r < args.n_rows; ++r) {
      if (args.rows[r] < 0 || args.rows[r] >= args.batch) {
        fail<std::out_of_range>("rows must lie in [0, ", args.batch, "), the sequences of cu_seqlens, got ",
                                args.rows[r], " at position ", r);
      }
    }
  }
  if (offsets != nullptr) {
    offsets[0] = 0;
    for (int64_t r = 0; r < args.n_rows; ++r) {
      offsets[r + 1] = offsets[r] + static_cast<int32_t>(length_of(args, r)) - 1;
    }
  }
}

static double bias_value(const AttentionArgs& args, int64_t i) {
  // float32 or the dtype of the data; 16-bit values widen through the two bit layouts.
  if (args.bias_dtype == DType::f64) return reinterpret_cast<const double*>(args.bias)[i];
  if (args.bias_dtype == DType::f32) return reinterpret_cast<const float*>(args.bias)[i];
  const uint32_t bits = reinterpret_cast<const uint16_t*>(args.bias)[i];
  const uint32_t sign = (bits & 0x8000u) << 16;
  uint32_t wide = args.bias_dtype == DType::bf16 ? bits << 16 : (bits & 0x7fffu) << 13;
  float value;
  std::memcpy(&value, &wide, 4);
  if (args.bias_dtype == DType::bf16) return value;
  value *= 0x1p112f;
  return sign != 0 ? -value : value;
}

// Mirrored, so that neighbouring queries find their biases for one key at rising addresses; one vector of room on
// either side, because the lanes past the last query load there too.
template <class T>
static void reverse_bias(const AttentionArgs& args, int64_t stride, T* out) {
  const int64_t size = 2 * args.bias_span - 1;
  for (int64_t h = 0; h < args.num_heads; ++h) {
    T* row = out + h * stride;
    for (int64_t t = 0; t < size; ++t) row[t] = static_cast<T>(bias_value(args, h * size + size - 1 - t));
    for (int64_t t = size; t < stride; ++t) row[t] = T(0);
  }
}

void Cpu::attention(const AttentionArgs& args) const {
  if (args.n_queries > args.n_present) {
    const int64_t row_bytes = args.num_heads * args.head_dim * size_of(args.dtype);
    std::memset(args.out + args.n_present * row_bytes, 0, static_cast<size_t>((args.n_queries - args.n_present) * row_bytes));
  }
  if (args.n_present == 0) return;
  AttentionPlan plan;
  int64_t work = 0;
  for (int64_t r = 0; r < args.n_rows; ++r) {
    const int64_t length = length_of(args, r);
    plan.max_length = length > plan.max_length ? length : plan.max_length;
    work += length * (args.part == kFirst ? 1 : length);
  }
  if (args.bias != nullptr) {
    EE_CHECK(plan.max_length <= args.bias_span, "position_bias must reach the longest length: [num_heads, 2 * M - 1] ",
             "with M >= ", plan.max_length, ", got M = ", args.bias_span);
    plan.bias_stride = 2 * args.bias_span - 1 + 64;
    const bool wide = args.dtype == DType::f64;
    void* room = thread_scratch(1, static_cast<size_t>(args.num_heads * plan.bias_stride * (wide ? 8 : 4)));
    if (wide) {
      reverse_bias(args, plan.bias_stride, static_cast<double*>(room));
    } else {
      reverse_bias(args, plan.bias_stride, static_cast<float*>(room));
    }
    plan.reversed_bias = static_cast<const char*>(room);
  }
  const KernelTable& table = kernels();
  const size_t scratch = static_cast<size_t>(table.attention_scratch(args, plan));
  const int64_t units = args.n_rows * args.num_heads;
  work *= 2 * args.num_heads * args.head_dim;
  if (work < kParallelWork) {
    table.attention(args, plan, 0, units, thread_scratch(0, scratch));
    return;
  }
  // Tasks of equal count, several for each thread: one may hold long sequences, the others are then taken elsewhere.
  const int64_t wanted = num_threads() * 8;
  const int64_t step = units > wanted ? units / wanted : 1;
  for_each_task((units + step - 1) / step, true, [&](int64_t task) {
    const int64_t begin = task * step;
    table.attention(args, plan, begin, begin + step < units ? begin + step : units, thread_scratch(0, scratch));
  });
}

}  // namespace consistentee
