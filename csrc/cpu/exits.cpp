// CPU backend of exit_policy and the LayerNorms: tiles and work sharing; the arithmetic is in simd/.
#include <cstring>

#include "backends.h"
#include "fail.h"
#include "parallel.h"
#include "simd/table.h"

namespace consistentee {

// Multiply-adds (or, for the norms, elements) from which a parallel region pays for its few microseconds.
static constexpr int64_t kParallelMacs = 128 * 1024;
static constexpr int64_t kParallelElements = 32 * 1024;

void Cpu::exit_policy(const ExitPolicyArgs& args) const {
  const KernelTable& table = kernels();
  const int64_t n = args.count, hidden = args.hidden;
  if (args.pooler_weight != nullptr) {
    constexpr int64_t kRows = 64, kOutputs = 64;
    const int64_t across = (hidden + kOutputs - 1) / kOutputs;
    const int64_t tiles = (n + kRows - 1) / kRows * across;
    const size_t scratch = static_cast<size_t>(table.pooler_scratch(args, n < kRows ? n : kRows));
    for_each_task(tiles, n * hidden * hidden >= kParallelMacs, [&](int64_t tile) {
      const int64_t n0 = tile / across * kRows, o0 = tile % across * kOutputs;
      table.pooler(args, n0, n0 + kRows < n ? n0 + kRows : n, o0, o0 + kOutputs < hidden ? o0 + kOutputs : hidden,
                   thread_scratch(0, scratch));
    });
  } else if (n > 0 && args.state != nullptr) {
    std::memcpy(args.state, args.first, static_cast<size_t>(n * hidden * size_of(args.dtype)));
  }
  if (args.logit == nullptr) return;
  constexpr int64_t kRows = 16;
  const size_t scratch = static_cast<size_t>(table.policy_scratch(args, kRows));
  for_each_task((n + kRows - 1) / kRows, n * hidden * args.width >= 4 * kParallelMacs, [&](int64_t tile) {
    const int64_t n0 = tile * kRows;
    table.policy(args, n0, n0 + kRows < n ? n0 + kRows : n, thread_scratch(0, scratch));
  });
}

using NormKernel = void (*)(const NormArgs&, int64_t, int64_t, void*);

static void run_norm(const NormArgs& args, NormKernel kernel) {
  const size_t scratch = static_cast<size_t>(kernels().norm_scratch(args));
  const int64_t n = args.count;
  if (n * args.hidden < kParallelElements) {
    kernel(args, 0, n, thread_scratch(0, scratch));
    return;
  }
  const int64_t step = (n + num_threads() * 4 - 1) / (num_threads() * 4);
  for_each_task((n + step - 1) / step, true, [&](int64_t task) {
    const int64_t begin = task * step;
    kernel(args, begin, begin + step < n ? begin + step : n, thread_scratch(0, scratch));
  });
}

void Cpu::add_layer_norm(const NormArgs& args) const { run_norm(args, kernels().add_norm); }

static void check_ids(const char* name, const Index& index, const char* table, int64_t size) {
  for (int64_t i = 0; i < index.count; ++i) {
    const int64_t id = index[i];
    if (__builtin_expect(id < 0 || id >= size, 0)) {
      fail<std::out_of_range>(name, " must lie in [0, ", size, "), the rows of ", table, ", got ", id, " at index ", i);
    }
  }
}

void Cpu::embed_layer_norm(const NormArgs& args) const {
  check_ids("input_ids", args.ids, "word", args.n_word);
  check_ids("positions", args.positions, "position", args.n_position);
  if (args.types.data != nullptr) check_ids("token_type_ids", args.types, "token_type", args.n_token_type);
  EE_CHECK(args.token_type == nullptr || args.n_token_type > 0, "token_type must have at least one row, got none");
  run_norm(args, kernels().embed_norm);
}

}  // namespace consistentee
