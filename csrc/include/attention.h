// Attention of packed sequences on Hopper, all tokens of a sequence seeing each other. A plain C function called
// through ctypes (kernels/hopper_attention.py), as product.h is.
#pragma once
#include <cstdint>

#include "graph.h"

// 16-bit floats, heads of 64 or 32. Strides are in elements. The removal (kernels/survivors.py) is of the same counts
// and cu_seqlens; keep is null where there is none.
struct AttentionCall {
  const void* qkv;            // (tokens, 3 heads head_dim), row stride qkv_stride: queries, keys, values side by side
  void* out;                  // (tokens, heads head_dim), row stride out_stride
  const void* bias;           // (heads, bias_side, bias_side) in the same floats, added to the scaled scores; or null
  const int32_t* cu_seqlens;  // (rows + 1,)
  const int32_t* counts;      // live rows, live tokens
  const uint8_t* keep;
  const int32_t* row_ids;
  int32_t* out_cu_seqlens;
  int32_t* token_dest;
  int32_t* out_counts;
  int32_t* out_row_ids;
  void* stream;
  int64_t rows, tokens, longest;  // capacities; no sequence is longer than `longest`, at most 128
  int64_t heads, head_dim;
  int64_t qkv_stride, out_stride;
  int64_t bias_side;  // at least 128, a multiple of 8; bias starts at 16 bytes
  float scale_log2;  // of the scores, times log2(e); above 0
  int32_t bfloat16;
};

constexpr int64_t kAttentionLongest = 128, kAttentionRemovalRows = 256;

// Null, or what went wrong.
EE_EXPORT const char* consistentee_attention(const AttentionCall* call);
