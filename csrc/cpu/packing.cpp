// CPU backend of the ops that move rows. Bandwidth-bound: whole runs of rows are copied with one memcpy where the
// source is dense, and threads join in above half a megabyte.
#include <cstring>

#include "backends.h"
#include "fail.h"
#include "parallel.h"

namespace consistentee {

static constexpr int64_t kParallelBytes = 512 * 1024;

static void copy_rows(char* out, int64_t out_stride, const char* in, int64_t in_stride, int64_t bytes, int64_t count) {
  if (in_stride == bytes && out_stride == bytes) {
    std::memcpy(out, in, static_cast<size_t>(bytes * count));
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    std::memcpy(out + i * out_stride, in + i * in_stride, static_cast<size_t>(bytes));
  }
}

// Splits [0, count) in pieces of about kParallelBytes / 4 and calls f(begin, end) for each.
template <class F>
static void split(int64_t count, int64_t bytes_each, const F& f) {
  const int64_t bytes = count * bytes_each;
  if (bytes < kParallelBytes) {
    f(int64_t{0}, count);
    return;
  }
  const int64_t pieces = bytes / (kParallelBytes / 4);
  const int64_t step = (count + pieces - 1) / pieces;
  for_each_task((count + step - 1) / step, true, [&](int64_t piece) {
    const int64_t begin = piece * step;
    f(begin, begin + step < count ? begin + step : count);
  });
}

static void check_cu_seqlens(const int32_t* cu_seqlens, int64_t batch, int64_t total, int32_t min_length) {
  EE_CHECK(cu_seqlens[0] == 0, "cu_seqlens must start with 0, got ", cu_seqlens[0]);
  for (int64_t i = 0; i < batch; ++i) {
    const int32_t length = cu_seqlens[i + 1] - cu_seqlens[i];
    EE_CHECK(length >= min_length, "cu_seqlens must give every sequence at least ", min_length, " tokens, got ",
             length, " for sequence ", i);
  }
  EE_CHECK(cu_seqlens[batch] <= total, "cu_seqlens must end within the number of rows (", total, "), got ",
           cu_seqlens[batch]);
}

void Cpu::prefix_sum(const int32_t* lengths, int64_t batch, int32_t* cu_seqlens) const {
  int64_t total = 0;
  cu_seqlens[0] = 0;
  for (int64_t i = 0; i < batch; ++i) {
    EE_CHECK(lengths[i] >= 0, "lengths must not be negative, got ", lengths[i], " at index ", i);
    total += lengths[i];
    EE_CHECK(total <= INT32_MAX, "lengths must sum to less than 2^31 tokens, they pass it at index ", i);
    cu_seqlens[i + 1] = static_cast<int32_t>(total);
  }
}

void Cpu::compact(const CompactArgs& args) const {
  const bool lead = args.layout == Layout::lead;
  const int32_t* cu = args.cu_seqlens;
  check_cu_seqlens(cu, args.batch, args.in.count, lead ? 1 : 0);
  int32_t active = 0;
  for (int64_t i = 0; i < args.batch; ++i) {
    if (args.keep[i]) args.active_rows[active++] = static_cast<int32_t>(i);
  }
  int32_t total = 0;
  for (int32_t i = 0; i < active; ++i) {
    const int32_t row = args.active_rows[i];
    args.out_cu_seqlens[i] = total;
    total += cu[row + 1] - cu[row];
  }
  for (int64_t i = active; i <= args.batch; ++i) args.out_cu_seqlens[i] = total;
  for (int64_t i = active; i < args.batch; ++i) args.active_rows[i] = -1;
  *args.n_active = active;

  const int64_t bytes = args.in.bytes, stride = args.in.stride;
  const int64_t shift = lead ? 1 : 0;  // tokens of a sequence that stand among the first tokens
  const char* in = args.in.data + (lead ? args.batch * stride : 0);
  char* out = args.out + (lead ? active * bytes : 0);
  if (lead) {
    for (int32_t i = 0; i < active; ++i) {
      std::memcpy(args.out + i * bytes, args.in.data + args.active_rows[i] * stride, static_cast<size_t>(bytes));
    }
  }
  const int64_t mean_bytes = active > 0 ? total * bytes / active : 0;
  split(active, mean_bytes, [&](int64_t begin, int64_t end) {
    // Neighbours that both stay are one run: with few exits, few and large copies.
    for (int64_t i = begin; i < end;) {
      int64_t last = i;
      while (last + 1 < end && args.active_rows[last + 1] == args.active_rows[last] + 1) ++last;
      const int64_t from = args.active_rows[i], to = args.active_rows[last] + 1;
      const int64_t source = cu[from] - shift * from;
      const int64_t count = cu[to] - shift * to - source;
      copy_rows(out + (args.out_cu_seqlens[i] - shift * i) * bytes, bytes, in + source * stride, stride, bytes, count);
      i = last + 1;
    }
  });
}

static void check_index(const char* tensor, const Index& index, int64_t rows) {
  for (int64_t i = 0; i < index.count; ++i) {
    const int64_t row = index[i];
    if (__builtin_expect(row < 0 || row >= rows, 0)) {
      fail<std::out_of_range>("index must lie in [0, ", rows, "), the rows of ", tensor, ", got ", row, " at position ",
                              i);
    }
  }
}

void Cpu::gather(const GatherArgs& args) const {
  check_index("x", args.index, args.in.count);
  split(args.index.count, args.in.bytes, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      std::memcpy(args.out + i * args.in.bytes, args.in.data + args.index[i] * args.in.stride,
                  static_cast<size_t>(args.in.bytes));
    }
  });
}

void Cpu::scatter(const ScatterArgs& args) const {
  check_index("out", args.index, args.out_count);
  // One thread: with duplicate indices the last row wins, which threads would make a race.
  for (int64_t i = 0; i < args.index.count; ++i) {
    std::memcpy(args.out + args.index[i] * args.out_stride, args.in.data + i * args.in.stride,
                static_cast<size_t>(args.in.bytes));
  }
}

void Cpu::pack_lead(const LeadArgs& args) const {
  const int32_t* cu = args.cu_seqlens;
  EE_CHECK(args.total == cu[args.batch], "total_tokens must be the sum of lengths (", cu[args.batch], "), got ",
           args.total);
  for (int64_t i = 0; i < args.batch; ++i) {
    EE_CHECK(cu[i + 1] > cu[i], "lengths must be at least 1 in the lead layout, got 0 at index ", i);
    EE_CHECK(cu[i + 1] - cu[i] <= args.max_seqlen, "lengths must not exceed the width of padded (", args.max_seqlen,
             "), got ", cu[i + 1] - cu[i], " at index ", i);
  }
  const int64_t bytes = args.row_bytes;
  split(args.batch, args.max_seqlen * bytes, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const char* row = args.in + i * args.max_seqlen * bytes;
      std::memcpy(args.out + i * bytes, row, static_cast<size_t>(bytes));
      std::memcpy(args.out + (args.batch + cu[i] - i) * bytes, row + bytes,
                  static_cast<size_t>((cu[i + 1] - cu[i] - 1) * bytes));
    }
  });
}

void Cpu::unpack_lead(const LeadArgs& args) const {
  const int32_t* cu = args.cu_seqlens;
  check_cu_seqlens(cu, args.batch, args.total, 1);
  for (int64_t i = 0; i < args.batch; ++i) {
    EE_CHECK(cu[i + 1] - cu[i] <= args.max_seqlen, "max_seqlen must be at least the longest length, got ",
             args.max_seqlen, " for a length of ", cu[i + 1] - cu[i], " at sequence ", i);
  }
  const int64_t bytes = args.row_bytes;
  split(args.batch, args.max_seqlen * bytes, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      char* row = args.out + i * args.max_seqlen * bytes;
      const int64_t length = cu[i + 1] - cu[i];
      std::memcpy(row, args.in + i * bytes, static_cast<size_t>(bytes));
      std::memcpy(row + bytes, args.in + (args.batch + cu[i] - i) * bytes, static_cast<size_t>((length - 1) * bytes));
      std::memset(row + length * bytes, 0, static_cast<size_t>((args.max_seqlen - length) * bytes));
    }
  });
}

}  // namespace consistentee
