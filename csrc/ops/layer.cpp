// Front end of finish_layer, which only the CPU has: elsewhere its torch twin serves.
#include "layer.h"

#include "attention.h"

namespace consistentee {

Finish read_finish(int64_t hidden, const FinishTensors& t) {
  Finish f;
  f.hidden = hidden;
  check_dim("intermediate_bias", t.intermediate_bias, 1);
  f.wide = t.intermediate_bias.size(0);
  f.project.weight = panels_of("attention_weight", t.attention_weight, hidden, hidden);
  f.project.bias = vector_of("attention_bias", t.attention_bias, hidden);
  f.widen.weight = panels_of("intermediate_weight", t.intermediate_weight, hidden, f.wide);
  f.widen.bias = vector_of("intermediate_bias", t.intermediate_bias, f.wide);
  f.narrow.weight = panels_of("output_weight", t.output_weight, f.wide, hidden);
  f.narrow.bias = vector_of("output_bias", t.output_bias, hidden);
  const auto norm = [&](NormArgs& args, const char* weight_name, const Tensor& weight, const char* bias_name,
                        const Tensor& bias, double eps) {
    args.weight = reinterpret_cast<const char*>(vector_of(weight_name, weight, hidden));
    args.bias = reinterpret_cast<const char*>(vector_of(bias_name, bias, hidden));
    args.eps = eps;
  };
  norm(f.first, "attention_norm_weight", t.attention_norm_weight, "attention_norm_bias", t.attention_norm_bias,
       t.attention_eps);
  norm(f.second, "output_norm_weight", t.output_norm_weight, "output_norm_bias", t.output_norm_bias, t.output_eps);
  f.project.next = f.widen.weight;
  f.widen.gelu = true;
  f.widen.next = f.narrow.weight;
  return f;
}

void multiply(const Cpu& backend, LinearArgs args, int64_t count, const float* x, int64_t inputs, float* out,
              int64_t outputs) {
  args.count = count;
  args.inputs = args.x_stride = inputs;
  args.outputs = outputs;
  args.x = x;
  args.out = out;
  backend.linear(args);
}

void finish(const Cpu& backend, const Finish& f, AttentionArgs& attention, const float* residual,
            int64_t residual_stride, const FinishBuffers& buffers, const float* next) {
  const int64_t count = attention.n_queries;
  const auto normalise = [&](NormArgs args, float* sum, const float* other, int64_t other_stride) {
    args.count = count;
    args.hidden = args.x_stride = f.hidden;
    args.x = reinterpret_cast<const char*>(sum);
    args.out = reinterpret_cast<char*>(sum);  // in place: a row is summed element by element before it is normed
    args.residual = reinterpret_cast<const char*>(other);
    args.residual_stride = other_stride;
    backend.add_layer_norm(args);
  };
  const auto [attended, x, inner] = buffers;
  attention.out = reinterpret_cast<char*>(attended);
  backend.attention(attention);
  multiply(backend, f.project, count, attended, f.hidden, x, f.hidden);
  normalise(f.first, x, residual, residual_stride);
  multiply(backend, f.widen, count, x, f.hidden, inner, f.wide);
  LinearArgs narrow = f.narrow;
  narrow.next = next;
  multiply(backend, narrow, count, inner, f.wide, attended, f.hidden);
  normalise(f.second, attended, x, f.hidden);
}

Tensor finish_layer(const Tensor& qkv, const Tensor& cu_seqlens, const std::optional<Tensor>& rows,
                    const Tensor& residual, int64_t num_heads, double scale, int64_t part,
                    const std::optional<Tensor>& position_bias, const Tensor& attention_weight,
                    const Tensor& attention_bias, const Tensor& attention_norm_weight,
                    const Tensor& attention_norm_bias, double attention_eps, const Tensor& intermediate_weight,
                    const Tensor& intermediate_bias, const Tensor& output_weight, const Tensor& output_bias,
                    const Tensor& output_norm_weight, const Tensor& output_norm_bias, double output_eps) {
  AttentionCall call;
  check_dtype("qkv", qkv, ScalarType::Float);
  const int64_t stride = row_stride("qkv", qkv), hidden = qkv.size(1) / 3;
  EE_CHECK(qkv.size(1) == 3 * hidden, "qkv must hold query, key and value side by side, got a width of ", qkv.size(1),
           ", which 3 does not divide");
  AttentionArgs& args = call.args;
  args.dtype = DType::f32;
  args.total = qkv.size(0);
  args.query_stride = args.key_stride = args.value_stride = stride;
  args.query = bytes_of(qkv);
  args.key = args.query + hidden * 4;
  args.value = args.key + hidden * 4;
  const Cpu backend(qkv);
  plan_attention(backend, call, "qkv", qkv, hidden, cu_seqlens, rows, num_heads, scale, part, position_bias, {});
  check_dtype("residual", residual, ScalarType::Float);
  const int64_t residual_stride = row_stride("residual", residual), count = residual.size(0);
  check_shape("residual", residual, {count, hidden});
  EE_CHECK(count >= call.args.n_present, "residual must have at least ", call.args.n_present,
           " rows, one for each query, got ", count);
  call.args.n_queries = count;
  const Finish f = read_finish(
      hidden, {attention_weight, attention_bias, attention_norm_weight, attention_norm_bias, attention_eps,
               intermediate_weight, intermediate_bias, output_weight, output_bias, output_norm_weight, output_norm_bias,
               output_eps});
  const Tensor attended = empty(qkv, {count, hidden}, ScalarType::Float);
  const Tensor x = empty(qkv, {count, hidden}, ScalarType::Float);
  const Tensor inner = empty(qkv, {count, f.wide}, ScalarType::Float);
  const auto memory = [](const Tensor& tensor) { return reinterpret_cast<float*>(out_bytes(tensor)); };
  finish(backend, f, args, floats(residual), residual_stride, {memory(attended), memory(x), memory(inner)}, nullptr);
  return attended;
}

STABLE_TORCH_LIBRARY_IMPL(consistentee, CPU, m) { m.impl("finish_layer", TORCH_BOX((&finish_layer))); }

}  // namespace consistentee
