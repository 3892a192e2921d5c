// Products of a captured pass on Hopper: out[:n] = act(x[:n] W^T + b), n read on the device. A plain C function called
// through ctypes (kernels/products.py), as graph.h is: no tensor is looked at here, only where its bytes stand.
#pragma once
#include <cstdint>

#include "graph.h"

// One launch. Strides are in elements. 16-bit floats throughout; the bias may be fp32.
//
// With few rows several programs share a sum. Who puts it together: with `partials`, whoever reads the result. Then a
// row has S partial sums, 4 up to some live count, 2 up to another (consistentee_product_limits); that of row r, share s
// and column c stands at (r S + s) outputs + c, the bias is in share 0, and `out` is not written. Beyond, the rows are
// in `out` as always. With `workspace` alone the last of the programs adds them up. With neither no sum is shared.
struct ProductCall {
  const void* x;       // (rows, inputs), row stride x_stride
  const void* weight;  // (outputs, inputs), row stride weight_stride
  const void* bias;    // (outputs,) or null
  void* out;           // (capacity, outputs), row stride out_stride
  const int32_t* count;  // live rows, on the device
  void* workspace;       // kProductWorkspace bytes, zeros before its first use, or null
  float* partials;       // kProductPartials floats, or null
  void* stream;
  int64_t rows, capacity, inputs, outputs;
  int64_t x_stride, weight_stride, out_stride;
  int32_t bfloat16, bias_fp32, gelu;
  int32_t path;  // one of the kernel's tiles, or -1: the kernel chooses by the live count
};

constexpr int64_t kProductPrograms = 160;    // that share tiles at most
constexpr int64_t kProductSums = 64 * 48;    // of one of them
constexpr int64_t kProductWorkspace = kProductPrograms * 4 * (1 + kProductSums);
constexpr int64_t kProductPartials = kProductPrograms * 128 * 192;

// Null, or what went wrong.
EE_EXPORT const char* consistentee_product(const ProductCall* call);
EE_EXPORT int64_t consistentee_product_workspace();
EE_EXPORT int64_t consistentee_product_partials();
// Live rows up to which a row has four partial sums, and up to which it has two, on the current device.
EE_EXPORT const char* consistentee_product_limits(int64_t inputs, int64_t outputs, int32_t* four, int32_t* two);
