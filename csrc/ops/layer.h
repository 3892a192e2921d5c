// A layer behind its query-key-value product, on the CPU: what finish_layer and run_encoder share.
#pragma once
#include "backends.h"
#include "linear.h"
#include "tensor.h"

namespace consistentee {

// Weights as the kernels take them.
struct Finish {
  int64_t hidden = 0, wide = 0;
  LinearArgs project, widen, narrow;
  NormArgs first, second;
};

// Tensors of a layer behind its qkv product, in the order of finish_layer.
struct FinishTensors {
  const Tensor &attention_weight, &attention_bias, &attention_norm_weight, &attention_norm_bias;
  double attention_eps;
  const Tensor &intermediate_weight, &intermediate_bias, &output_weight, &output_bias, &output_norm_weight,
      &output_norm_bias;
  double output_eps;
};

Finish read_finish(int64_t hidden, const FinishTensors& tensors);

// out [count, outputs] = args' product of x [count, inputs], both contiguous.
void multiply(const Cpu& backend, LinearArgs args, int64_t count, const float* x, int64_t inputs, float* out,
              int64_t outputs);

// Buffers of one row for each query: attended and x [count, hidden], inner [count, wide], all written over. The result
// stands in attended.
struct FinishBuffers {
  float *attended, *x, *inner;
};

// Takes the queries of `attention` through the rest of the layer. `next`: the weight that is read afterwards, or null.
void finish(const Cpu& backend, const Finish& f, AttentionArgs& attention, const float* residual,
            int64_t residual_stride, const FinishBuffers& buffers, const float* next);

}  // namespace consistentee
