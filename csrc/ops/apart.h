// Ops that write where others still read: pieces of memory by name, and that none of them overlap.
#pragma once
#include <string>
#include <utility>
#include <vector>

#include "tensor.h"

namespace consistentee {

// A piece of memory an op reads or writes, with the name it goes by in messages.
struct Region {
  std::string name;
  const char* begin;
  const char* end;
  bool written;
};

inline Region region(std::string name, const Tensor& tensor, bool written) {
  const char* begin = bytes_of(tensor);
  return {std::move(name), begin, begin + tensor.numel() * static_cast<int64_t>(tensor.element_size()), written};
}

// Threads read their inputs while others already write, so a shared byte is a race.
inline void check_apart(const std::vector<Region>& regions) {
  for (size_t i = 0; i < regions.size(); ++i) {
    for (size_t j = 0; j < i; ++j) {
      const Region &a = regions[i], &b = regions[j];
      EE_CHECK(!(a.written || b.written) || a.begin >= b.end || b.begin >= a.end || a.begin == a.end || b.begin == b.end,
               a.name, " must not share memory with ", b.name, ": use a second set of buffers, and swap");
    }
  }
}

}  // namespace consistentee
