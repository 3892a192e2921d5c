// From the sums of a matrix instruction to stores of 16 bytes.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace consistentee {
namespace cuda {

template <bool kBfloat16>
__device__ inline uint32_t pack(float low, float high) {
  if constexpr (kBfloat16) {
    const __nv_bfloat162 two = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t&>(two);
  } else {
    const __half2 two = __floats2half2_rn(low, high);
    return reinterpret_cast<const uint32_t&>(two);
  }
}

template <bool kBfloat16>
__device__ inline float2 unpack(uint32_t two) {
  if constexpr (kBfloat16) {
    return __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(two));
  } else {
    return __half22float2(reinterpret_cast<const __half2&>(two));
  }
}

__device__ inline float exp2_of(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
}

// Turns a block of words held by the four lanes of a quad (4 x 4, or two of 2 x 2), so that each lane has its words
// side by side.
template <int kWords>
__device__ inline void turn(uint32_t (&w)[kWords], int lane) {
  const bool odd = lane & 1, upper = lane & 2;
#pragma unroll
  for (int i = 0; i < kWords; i += 2) {
    const uint32_t got = __shfl_xor_sync(0xffffffffu, odd ? w[i] : w[i + 1], 1);
    if (odd) {
      w[i] = got;
    } else {
      w[i + 1] = got;
    }
  }
  if constexpr (kWords == 4) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t got = __shfl_xor_sync(0xffffffffu, upper ? w[i] : w[i + 2], 2);
      if (upper) {
        w[i] = got;
      } else {
        w[i + 2] = got;
      }
    }
  }
}

}  // namespace cuda
}  // namespace consistentee
