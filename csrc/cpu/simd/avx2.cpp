#include <cstdint>

#include "table.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

#define EE_NAMESPACE avx2
#define EE_TABLE kAvx2Kernels
#define EE_NAME "avx2"
#define EE_VECTOR_BYTES 32
#define EE_REGISTERS 16
#include "kernels.inc"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif  // __x86_64__
