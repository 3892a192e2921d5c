// CPU backend of what a decoding step does between its products: work sharing; the arithmetic is in simd/decode.h.
#include "backends.h"
#include "parallel.h"
#include "simd/table.h"

namespace consistentee {

// Elements, or multiply-adds of attention, from which a parallel region pays for its few microseconds.
static constexpr int64_t kParallelElements = 32 * 1024;
static constexpr int64_t kParallelMacs = 64 * 1024;

void Cpu::rms_norm(const RmsNormArgs& args) const {
  const KernelTable& table = kernels();
  const int64_t n = args.count, step = (n + num_threads() * 4 - 1) / (num_threads() * 4);
  if (n * args.hidden < kParallelElements) {
    table.rms_norm(args, 0, n);
    return;
  }
  for_each_task((n + step - 1) / step, true, [&](int64_t task) {
    const int64_t begin = task * step;
    table.rms_norm(args, begin, begin + step < n ? begin + step : n);
  });
}

void Cpu::swiglu(const float* gate_up, int64_t count, int64_t width, float* out) const {
  const KernelTable& table = kernels();
  for_each_task(count, count * width >= kParallelElements, [&](int64_t n) {
    const float* row = gate_up + n * 2 * width;
    table.swiglu(row, row + width, width, out + n * width);
  });
}

void Cpu::decode_attention(const DecodeAttentionArgs& args) const {
  const KernelTable& table = kernels();
  int64_t longest = 0, total = 0;
  for (int64_t n = 0; n < args.count; ++n) {
    longest = args.lengths[n] > longest ? args.lengths[n] : longest;
    total += args.lengths[n];
  }
  const size_t scratch = static_cast<size_t>(args.heads / args.kv_heads * (longest + 16)) * sizeof(float);
  const bool parallel = total * args.heads * args.head_dim * 2 >= kParallelMacs;
  for_each_task(args.count * args.kv_heads, parallel, [&](int64_t unit) {
    float* room = static_cast<float*>(thread_scratch(0, scratch));
    table.decode_attention(args, unit / args.kv_heads, unit % args.kv_heads, room);
  });
}

}  // namespace consistentee
