// The vector kernels, compiled once for each instruction set; dispatch.cpp picks a table when it is first needed.
#pragma once
#include "args.h"

namespace consistentee {

// One (sequence, head) pair is a unit; unit u is head u % num_heads of served sequence u / num_heads.
struct AttentionPlan {
  const char* reversed_bias = nullptr;  // [num_heads, bias_stride], element t = bias[2 * span - 2 - t]; f32 or f64
  int64_t bias_stride = 0;
  int64_t max_length = 0;
};

struct KernelTable {
  const char* name;
  int64_t (*attention_scratch)(const AttentionArgs&, const AttentionPlan&);  // bytes for one thread
  void (*attention)(const AttentionArgs&, const AttentionPlan&, int64_t unit_begin, int64_t unit_end, void* scratch);
  // out[n, o] = act(x[n] . weight[o] + bias[o]) for rows [n0, n1) and outputs [o0, o1); see exits.h.
  int64_t (*pooler_scratch)(const ExitPolicyArgs&, int64_t rows);
  void (*pooler)(const ExitPolicyArgs&, int64_t n0, int64_t n1, int64_t o0, int64_t o1, void* scratch);
  int64_t (*policy_scratch)(const ExitPolicyArgs&, int64_t rows);
  void (*policy)(const ExitPolicyArgs&, int64_t n0, int64_t n1, void* scratch);
  // Rows [n0, n1) by panels [p0, p1); `next`: what is worked on afterwards, to be fetched meanwhile.
  void (*linear)(const LinearArgs&, int64_t n0, int64_t n1, int64_t p0, int64_t p1, const char* next,
                 int64_t next_bytes);
  int64_t (*norm_scratch)(const NormArgs&);
  void (*add_norm)(const NormArgs&, int64_t n0, int64_t n1, void* scratch);
  void (*embed_norm)(const NormArgs&, int64_t n0, int64_t n1, void* scratch);
  void (*rms_norm)(const RmsNormArgs&, int64_t n0, int64_t n1);
  void (*swiglu)(const float* gate, const float* up, int64_t width, float* out);
  // One row and one head of keys, for all the query heads that share it. scratch: decode_scratch floats.
  void (*decode_attention)(const DecodeAttentionArgs&, int64_t row, int64_t kv_head, float* scratch);
};

const KernelTable& kernels();
extern const KernelTable kBaselineKernels;
#if defined(__x86_64__)
extern const KernelTable kAvx2Kernels;
extern const KernelTable kAvx512Kernels;
#endif

}  // namespace consistentee
