// Errors as sentences. No torch header: the CPU kernels use it for the values that only they look at.
#pragma once
#include <sstream>
#include <stdexcept>

namespace consistentee {

// std::invalid_argument arrives in Python as ValueError, std::out_of_range as IndexError; torch's own check macro
// would make both a RuntimeError with the path of our source file in front of the sentence.
template <class Error, class... Parts>
[[noreturn, gnu::noinline, gnu::cold]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw Error(text.str());
}

}  // namespace consistentee

#define EE_CHECK(condition, ...) \
  if (__builtin_expect(!(condition), 0)) ::consistentee::fail<std::invalid_argument>(__VA_ARGS__)
