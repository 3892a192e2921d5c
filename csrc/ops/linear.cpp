// Front ends of packed_linear and finish_layer, which only the CPU has: elsewhere their torch twins serve.
#include "attention.h"

namespace consistentee {

static const float* floats(const Tensor& tensor) { return reinterpret_cast<const float*>(bytes_of(tensor)); }

static const float* vector_of(const char* name, const Tensor& tensor, int64_t size) {
  check_dtype(name, tensor, ScalarType::Float);
  check_shape(name, tensor, {size});
  check_contiguous(name, tensor);
  return floats(tensor);
}

static const float* panels_of(const char* name, const Tensor& weight, int64_t inputs, int64_t outputs) {
  check_dtype(name, weight, ScalarType::Float);
  check_shape(name, weight, {(outputs + kPanel - 1) / kPanel, inputs, kPanel});
  check_contiguous(name, weight);
  return floats(weight);
}

Tensor packed_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, int64_t outputs,
                     bool gelu) {
  LinearArgs args;
  check_dtype("x", x, ScalarType::Float);
  args.x_stride = row_stride("x", x);
  args.count = x.size(0);
  args.inputs = x.size(1);
  EE_CHECK(outputs >= 0, "outputs must not be negative, got ", outputs);
  args.outputs = outputs;
  args.weight = panels_of("weight", weight, args.inputs, outputs);
  if (bias.has_value()) args.bias = vector_of("bias", *bias, outputs);
  args.x = floats(x);
  args.gelu = gelu;
  Tensor out = empty(x, {args.count, outputs}, ScalarType::Float);
  args.out = reinterpret_cast<float*>(out_bytes(out));
  Cpu(x).linear(args);
  return out;
}

Tensor finish_layer(const Tensor& qkv, const Tensor& cu_seqlens, const std::optional<Tensor>& rows,
                    const Tensor& residual, int64_t num_heads, double scale, int64_t part,
                    const std::optional<Tensor>& position_bias, const Tensor& attention_weight,
                    const Tensor& attention_bias, const Tensor& attention_norm_weight,
                    const Tensor& attention_norm_bias, double attention_eps, const Tensor& intermediate_weight,
                    const Tensor& intermediate_bias, const Tensor& output_weight, const Tensor& output_bias,
                    const Tensor& output_norm_weight, const Tensor& output_norm_bias, double output_eps) {
  AttentionCall call;
  AttentionArgs& attention = call.args;
  check_dtype("qkv", qkv, ScalarType::Float);
  const int64_t stride = row_stride("qkv", qkv), hidden = qkv.size(1) / 3;
  EE_CHECK(qkv.size(1) == 3 * hidden, "qkv must hold query, key and value side by side, got a width of ", qkv.size(1),
           ", which 3 does not divide");
  attention.dtype = DType::f32;
  attention.total = qkv.size(0);
  attention.query_stride = attention.key_stride = attention.value_stride = stride;
  attention.query = bytes_of(qkv);
  attention.key = attention.query + hidden * 4;
  attention.value = attention.key + hidden * 4;
  const Cpu backend(qkv);
  plan_attention(backend, call, "qkv", qkv, hidden, cu_seqlens, rows, num_heads, scale, part, position_bias, {});
  check_dtype("residual", residual, ScalarType::Float);
  const int64_t residual_stride = row_stride("residual", residual), count = residual.size(0);
  check_shape("residual", residual, {count, hidden});
  EE_CHECK(count >= attention.n_present, "residual must have at least ", attention.n_present,
           " rows, one for each query, got ", count);
  attention.n_queries = count;
  check_dim("intermediate_bias", intermediate_bias, 1);
  const int64_t wide = intermediate_bias.size(0);
  LinearArgs project, widen, narrow;
  project.weight = panels_of("attention_weight", attention_weight, hidden, hidden);
  project.bias = vector_of("attention_bias", attention_bias, hidden);
  widen.weight = panels_of("intermediate_weight", intermediate_weight, hidden, wide);
  widen.bias = vector_of("intermediate_bias", intermediate_bias, wide);
  narrow.weight = panels_of("output_weight", output_weight, wide, hidden);
  narrow.bias = vector_of("output_bias", output_bias, hidden);
  NormArgs first, second;
  first.weight = reinterpret_cast<const char*>(vector_of("attention_norm_weight", attention_norm_weight, hidden));
  first.bias = reinterpret_cast<const char*>(vector_of("attention_norm_bias", attention_norm_bias, hidden));
  second.weight = reinterpret_cast<const char*>(vector_of("output_norm_weight", output_norm_weight, hidden));
  second.bias = reinterpret_cast<const char*>(vector_of("output_norm_bias", output_norm_bias, hidden));
  first.eps = attention_eps;
  second.eps = output_eps;

  Tensor attended = empty(qkv, {count, hidden}, ScalarType::Float);
  Tensor x = empty(qkv, {count, hidden}, ScalarType::Float);
  Tensor inner = empty(qkv, {count, wide}, ScalarType::Float);
  const auto multiply = [&](LinearArgs& args, const Tensor& from, int64_t inputs, const Tensor& to, int64_t outputs) {
    args.count = count;
    args.inputs = args.x_stride = inputs;
    args.outputs = outputs;
    args.x = floats(from);
    args.out = reinterpret_cast<float*>(out_bytes(to));
    backend.linear(args);
  };
  const auto normalise = [&](NormArgs& args, const Tensor& sum, const Tensor& other, int64_t other_stride) {
    args.count = count;
    args.hidden = args.x_stride = hidden;
    args.x = bytes_of(sum);
    args.out = out_bytes(sum);  // in place: a row is summed element by element before it is normed
    args.residual = bytes_of(other);
    args.residual_stride = other_stride;
    backend.add_layer_norm(args);
  };
  attention.out = out_bytes(attended);
  backend.attention(attention);
  project.next = widen.weight;
  multiply(project, attended, hidden, x, hidden);
  normalise(first, x, residual, residual_stride);
  widen.gelu = true;
  widen.next = narrow.weight;
  multiply(widen, x, hidden, inner, wide);
  multiply(narrow, inner, wide, attended, hidden);
  normalise(second, attended, x, hidden);
  return attended;
}

STABLE_TORCH_LIBRARY_IMPL(consistentee, CPU, m) {
  m.impl("packed_linear", TORCH_BOX((&packed_linear)));
  m.impl("finish_layer", TORCH_BOX((&finish_layer)));
}

}  // namespace consistentee
