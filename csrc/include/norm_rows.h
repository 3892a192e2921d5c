// Add & Norm of a captured pass, a warp a row. A plain C function called through ctypes (kernels/norm_rows.py), as
// product.h is.
#pragma once
#include <cstdint>

#include "graph.h"

// One launch. 16-bit floats, rows of up to 768 of them, a multiple of 8; rows, weight and bias start at 16 bytes,
// strides are multiples of 8 elements.
struct NormRowsCall {
  void* out;             // (capacity, hidden), row stride out_stride
  const void* x;         // (capacity, hidden), row stride x_stride
  const void* residual;  // (capacity, hidden), row stride residual_stride
  const void* weight;    // (hidden,)
  const void* bias;      // (hidden,)
  const int32_t* live;   // rows, on the device
  const int32_t* dest;   // (capacity,) where row i goes, -1: nowhere; or null: it stays
  const float* sums;     // of x as `Partials` has them, or null
  void* stream;
  int64_t capacity, hidden;
  int64_t out_stride, x_stride, residual_stride;
  float eps;
  int32_t four, two;  // live rows up to which a row of x stands in so many sums
  int32_t settled;    // dest is no result of the kernel in front
  int32_t bfloat16;
};

// Null, or what went wrong.
EE_EXPORT const char* consistentee_norm_rows(const NormRowsCall* call);
