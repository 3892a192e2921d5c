// step_rows_ on the CPU: the rows one by one.
#include <cmath>

#include "backends.h"
#include "fail.h"

namespace consistentee {

namespace {

#define EE_INLINE static inline
#include "simd/convert.h"
#undef EE_INLINE

constexpr int64_t kLanes = 8;

// The sum of the row's partial sums in the order in which the CUDA kernel adds them.
float z_of(const StepRowsArgs& args, int32_t row, float bias) {
  const float* parts = args.partial + row * args.splits;
  float sums[kLanes] = {};
  for (int64_t s = 0; s < args.splits; ++s) sums[s % kLanes] += parts[s];
  for (int64_t step = kLanes / 2; step > 0; step /= 2) {
    for (int64_t lane = 0; lane < step; ++lane) sums[lane] += sums[lane + step];
  }
  return sums[0] + bias;
}

void check_values(const StepRowsArgs& args) {
  const int32_t live = args.counts[0];
  EE_CHECK(live >= 0 && live <= args.cap_rows, "counts[0], the live rows, must lie in [0, ", args.cap_rows, "], got ",
           live);
  const int64_t held = args.blocks * args.block_size;
  for (int32_t i = 0; i < live; ++i) {
    const int32_t row = args.order[i];
    EE_CHECK(row >= 0 && row < args.cap_rows, "order must hold row ids in [0, ", args.cap_rows, ") for the ", live,
             " live rows, got ", row, " at ", i);
    if (args.next_layer == 0 || args.kind == kLeave) continue;
    const int32_t position = args.positions[row];
    EE_CHECK(position >= 0, "positions must not be negative, got ", position, " for row ", row);
    const int32_t mark = args.watermarks[row * args.layers + args.next_layer - 1];
    EE_CHECK(mark >= 0, "watermarks must not be negative, got ", mark, " for row ", row, " in layer ",
             args.next_layer);
    EE_CHECK(position <= mark || position <= held, "block_table must have blocks for all positions of a row in front "
             "of its newest, got ", args.blocks, " blocks of ", args.block_size, " for row ", row, " at position ",
             position);
  }
}

}  // namespace

void Cpu::step_rows(const StepRowsArgs& args) const {
  check_values(args);
  float bias = 0.0f;
  if (args.kind == kDecide) read_as(&bias, args.b2, 0, 1, args.b2_dtype);
  const int32_t live = args.counts[0];
  int32_t stay = 0;
  int64_t owed = 0;
  for (int32_t i = 0; i < live; ++i) {
    const int32_t row = args.order[i];
    bool leaves = args.kind == kLeave;
    float prob = 1.0f;
    if (args.kind == kDecide) {
      const float z = z_of(args, row, bias);
      const bool forced = args.max_depth[row] <= args.layer;
      const bool asked = args.script[row] > 0 ? args.script[row] <= args.layer : z > args.threshold_logit[row];
      leaves = (asked || forced) && args.min_depth[row] <= args.layer;
      if (!forced) prob = 1.0f / (1.0f + std::exp(-z));
    }
    if (leaves) {
      args.exit_layers[row] = args.layer;
      args.exit_probs[row] = prob;
      continue;
    }
    args.out_order[stay++] = row;
    if (args.next_layer == 0) continue;
    int32_t& mark = args.watermarks[row * args.layers + args.next_layer - 1];
    const int32_t position = args.positions[row];
    const int32_t* blocks = args.block_table + row * args.blocks;
    for (int32_t p = mark; p < position && owed < args.cap_owed; ++p, ++owed) {
      args.owed_slots[owed] = blocks[p / args.block_size] * args.block_size + p % args.block_size;
      args.owed_positions[owed] = p;
    }
    mark = position + 1;
  }
  args.out_counts[0] = stay;
  args.out_counts[1] = static_cast<int32_t>(owed);
  if (args.settled != nullptr) *args.settled += owed;
}

}  // namespace consistentee
