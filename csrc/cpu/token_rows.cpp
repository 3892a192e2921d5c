#include "token_rows.h"

#include <algorithm>
#include <cstring>

namespace consistentee {

// Whether all are in 0 ... limit - 1: as unsigned numbers, negative ones are the greatest.
static bool all_below(const int64_t* values, int64_t count, int64_t limit) {
  uint64_t greatest = 0;
  for (int64_t i = 0; i < count; ++i) greatest = std::max(greatest, static_cast<uint64_t>(values[i]));
  return greatest < static_cast<uint64_t>(limit);
}

// Where a row's tokens begin; their number, -1 where its mask is not one block of 1s between 0s.
struct Block {
  int64_t begin, length;
};
static Block block_of(const int64_t* mask, int64_t width) {
  if (mask == nullptr) return {0, width};
  uint64_t ones = 0, bits = 0;  // unsigned: a mask may hold anything
  for (int64_t i = 0; i < width; ++i) {
    ones += static_cast<uint64_t>(mask[i]);
    bits |= static_cast<uint64_t>(mask[i]);
  }
  if (bits > 1) return {0, -1};
  const auto length = static_cast<int64_t>(ones);
  if (length == width) return {0, width};
  const int64_t begin = std::find(mask, mask + width, 1) - mask;
  if (begin + length > width) return {0, -1};
  int64_t within = 0;
  for (int64_t i = begin; i < begin + length; ++i) within += mask[i];
  return {begin, within == length ? length : -1};
}

}  // namespace consistentee

int64_t consistentee_token_rows_read(const int64_t* ids, const int64_t* mask, const int64_t* types, int64_t rows,
                                     int64_t width, int64_t vocab, int64_t type_vocab) {
  int64_t tokens = 0, typed = 0;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t at = row * width;
    const auto [begin, length] = consistentee::block_of(mask == nullptr ? nullptr : mask + at, width);
    if (length < 1 || !consistentee::all_below(ids + at + begin, length, vocab)) return -1;
    if (types != nullptr) {
      const int64_t* const own = types + at + begin;
      if (!consistentee::all_below(own, length, type_vocab)) return -1;
      for (int64_t i = 0; i < length; ++i) typed |= own[i];
    }
    tokens += length;
  }
  return 2 * tokens + (typed != 0);
}

bool consistentee_token_rows_pack(const int64_t* values, const int64_t* mask, int64_t rows, int64_t width,
                                  int64_t tokens, int64_t* out, int64_t* lengths) {
  for (int64_t row = 0; row < rows; ++row) {
    const auto [begin, length] = consistentee::block_of(mask + row * width, width);
    if (length < 1 || length > tokens) return false;
    tokens -= length;
    std::memcpy(out, values + row * width + begin, static_cast<size_t>(length) * sizeof(int64_t));
    out += length;
    if (lengths != nullptr) lengths[row] = length;
  }
  return tokens == 0;
}
