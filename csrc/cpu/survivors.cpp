// survivors_ on the CPU: one pass over the rows and their tokens.
#include <cstring>

#include "backends.h"
#include "fail.h"

namespace consistentee {

void Cpu::survivors(const SurvivorsArgs& args) const {
  const int32_t* cu = args.cu_seqlens;
  const int32_t rows = args.counts[0], tokens = args.counts[1];
  EE_CHECK(rows >= 0 && rows <= args.cap_rows, "counts[0], the live rows, must lie in [0, ", args.cap_rows, "], got ",
           rows);
  EE_CHECK(tokens >= 0 && tokens <= args.cap_tokens, "counts[1], the live tokens, must lie in [0, ", args.cap_tokens,
           "], got ", tokens);
  if (rows > 0) EE_CHECK(cu[0] == 0, "cu_seqlens must start with 0, got ", cu[0]);
  for (int32_t i = 0; i < rows; ++i) {
    EE_CHECK(cu[i + 1] >= cu[i], "cu_seqlens must not fall, got ", cu[i], " and ", cu[i + 1], " for live row ", i);
  }
  const int32_t total = rows > 0 ? cu[rows] : 0;
  EE_CHECK(total == tokens, "counts[1], the live tokens, must be where cu_seqlens puts the end of the live rows (",
           total, "), got ", tokens);

  int32_t kept = 0, place = 0;
  for (int32_t i = 0; i < rows; ++i) {
    if (args.keep[i] == 0) {
      for (int32_t t = cu[i]; t < cu[i + 1]; ++t) args.token_dest[t] = -1;
      continue;
    }
    args.out_cu_seqlens[kept] = place;
    for (int32_t t = cu[i]; t < cu[i + 1]; ++t) args.token_dest[t] = place++;
    for (int32_t s = 0; s < args.n_states; ++s) {
      const RowState& state = args.states[s];
      std::memcpy(state.out + static_cast<int64_t>(kept) * state.bytes,
                  state.in + static_cast<int64_t>(i) * state.bytes, static_cast<size_t>(state.bytes));
    }
    ++kept;
  }
  for (int64_t i = kept; i <= args.cap_rows; ++i) args.out_cu_seqlens[i] = place;
  for (int64_t t = tokens; t < args.cap_tokens; ++t) args.token_dest[t] = -1;
  args.out_counts[0] = kept;
  args.out_counts[1] = place;
}

}  // namespace consistentee
