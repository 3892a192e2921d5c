// survivors_ on CUDA: one launch, limited by latency (some KB move). Every block repeats the scan over the rows, which
// costs less than telling other blocks its result: up to 256 rows are one round of loads, two barriers and a few
// shuffles, whereas a last-block pattern adds an atomic and a fence to the same path and leaves the tokens to one block,
// and a second launch costs more than the whole scan. So the grid is
//   [token blocks]  token_dest, 512 tokens each
//   [one block]     out_cu_seqlens and out_counts
//   [one a state]   the surviving entries of one array, loaded before the scan is done
// and no block waits for another.
#include "scan.cuh"

namespace consistentee {
namespace cuda {

constexpr int kThreads = 256;  // rows of one round of the scan
constexpr int kTokensPerThread = 2;
constexpr int kTokens = kThreads * kTokensPerThread;
constexpr int32_t kGone = INT32_MIN;

__device__ inline int32_t live_count(int32_t count, int64_t capacity) {
  return static_cast<int32_t>(count < 0 ? 0 : count > capacity ? capacity : count);
}

// One row as every block sees it; `before` are the surviving rows and tokens in front of it.
struct Row {
  int32_t start = 0, length = 0;
  bool stays = false;
};
__device__ inline Row row_at(const SurvivorsArgs& args, int64_t i, int32_t rows) {
  Row row;
  if (i < rows) {
    row.start = args.cu_seqlens[i];
    row.length = args.cu_seqlens[i + 1] - row.start;
    row.stays = args.keep[i] != 0;
  }
  return row;
}
__device__ inline Pair counted(const Row& row) { return row.stays ? Pair{1, row.length} : Pair{0, 0}; }

__device__ void place_tokens(const SurvivorsArgs& args, int64_t block, int32_t rows, int32_t tokens) {
  __shared__ int32_t starts[kThreads];  // of the sequences of this round, before compaction
  __shared__ int32_t shifts[kThreads];  // how far their tokens move; kGone where they leave
  __shared__ int32_t round_end;
  const int64_t first = block * kTokens;
  const int64_t end = first + kTokens < tokens ? first + kTokens : tokens;  // of the live tokens of this block
  int32_t dest[kTokensPerThread];
#pragma unroll
  for (int k = 0; k < kTokensPerThread; ++k) dest[k] = -1;

  Pair carry{0, 0};
  for (int64_t base = 0; base < rows && first < end; base += kThreads) {
    const Row row = row_at(args, base + threadIdx.x, rows);
    const Pair before = scan_threads<Pair, kThreads>(counted(row), &carry);
    const int32_t count = static_cast<int32_t>(rows - base < kThreads ? rows - base : kThreads);
    starts[threadIdx.x] = row.start;
    shifts[threadIdx.x] = row.stays ? before.tokens - row.start : kGone;
    if (static_cast<int32_t>(threadIdx.x) == count - 1) round_end = row.start + row.length;
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kTokensPerThread; ++k) {
      const int64_t token = first + k * kThreads + threadIdx.x;
      if (token >= end || token < starts[0] || token >= round_end) continue;
      // The last start at or before the token: never an empty sequence.
      const int32_t shift =
          shifts[last_at_or_before(count, token, [&](int64_t j) { return static_cast<int64_t>(starts[j]); })];
      const int64_t place = token + shift;
      if (shift != kGone && place >= 0 && place < args.cap_tokens) dest[k] = static_cast<int32_t>(place);
    }
    const bool done = round_end >= end;
    __syncthreads();  // the shared arrays are read before the next round writes them
    if (done) break;
  }
#pragma unroll
  for (int k = 0; k < kTokensPerThread; ++k) {
    const int64_t token = first + k * kThreads + threadIdx.x;
    if (token < args.cap_tokens) args.token_dest[token] = dest[k];
  }
}

__device__ void write_bounds(const SurvivorsArgs& args, int32_t rows) {
  Pair carry{0, 0};
  for (int64_t base = 0; base < rows; base += kThreads) {
    const Row row = row_at(args, base + threadIdx.x, rows);
    const Pair before = scan_threads<Pair, kThreads>(counted(row), &carry);
    if (row.stays) args.out_cu_seqlens[before.rows] = before.tokens;
  }
  for (int64_t i = carry.rows + threadIdx.x; i <= args.cap_rows; i += kThreads) args.out_cu_seqlens[i] = carry.tokens;
  if (threadIdx.x == 0) {
    args.out_counts[0] = carry.rows;
    args.out_counts[1] = carry.tokens;
  }
}

template <class Item>
__device__ void move_state(const SurvivorsArgs& args, const RowState& state, int32_t rows) {
  int32_t carry = 0;
  for (int64_t base = 0; base < rows; base += kThreads) {
    const int64_t i = base + threadIdx.x;
    const bool stays = i < rows && args.keep[i] != 0;
    const Item value = i < rows ? reinterpret_cast<const Item*>(state.in)[i] : Item{};
    const int32_t before = scan_threads<int32_t, kThreads>(stays ? 1 : 0, &carry);
    if (stays) reinterpret_cast<Item*>(state.out)[before] = value;
  }
}

__global__ void __launch_bounds__(kThreads) mark_survivors_kernel(const __grid_constant__ SurvivorsArgs args,
                                                                  int64_t token_blocks) {
  // The kernel in front, an exit, writes `keep` and no counts.
  const int32_t rows = live_count(__ldcg(args.counts), args.cap_rows);
  const int32_t tokens = live_count(__ldcg(args.counts + 1), args.cap_tokens);
  wait_for_kernel_in_front();
  const int64_t block = blockIdx.x;
  if (block < token_blocks) {
    place_tokens(args, block, rows, tokens);
  } else if (block == token_blocks) {
    write_bounds(args, rows);
  } else {
    const RowState& state = args.states[block - token_blocks - 1];
    if (state.bytes == 8) {
      move_state<uint64_t>(args, state, rows);
    } else {
      move_state<uint32_t>(args, state, rows);
    }
  }
}

const char* survivors(const SurvivorsArgs& args, void* stream) {
  const int64_t token_blocks = blocks_for(args.cap_tokens, kTokens);
  const unsigned blocks = static_cast<unsigned>(token_blocks + 1 + args.n_states);
  return launch_early(mark_survivors_kernel, blocks, kThreads, 0, stream, args, token_blocks);
}

}  // namespace cuda
}  // namespace consistentee
