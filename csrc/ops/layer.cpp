// Front ends of finish_layer and run_layers, which only the CPU has: elsewhere their torch twins serve.
#include <cmath>
#include <limits>
#include <tuple>
#include <vector>

#include "attention.h"
#include "linear.h"

namespace consistentee {

namespace {

// What follows a layer's qkv product: weights as the kernels take them.
struct Finish {
  int64_t hidden = 0, wide = 0;
  LinearArgs project, widen, narrow;
  NormArgs first, second;
};

Finish read_finish(int64_t hidden, const Tensor& attention_weight, const Tensor& attention_bias,
                   const Tensor& attention_norm_weight, const Tensor& attention_norm_bias, double attention_eps,
                   const Tensor& intermediate_weight, const Tensor& intermediate_bias, const Tensor& output_weight,
                   const Tensor& output_bias, const Tensor& output_norm_weight, const Tensor& output_norm_bias,
                   double output_eps) {
  Finish f;
  f.hidden = hidden;
  check_dim("intermediate_bias", intermediate_bias, 1);
  f.wide = intermediate_bias.size(0);
  f.project.weight = panels_of("attention_weight", attention_weight, hidden, hidden);
  f.project.bias = vector_of("attention_bias", attention_bias, hidden);
  f.widen.weight = panels_of("intermediate_weight", intermediate_weight, hidden, f.wide);
  f.widen.bias = vector_of("intermediate_bias", intermediate_bias, f.wide);
  f.narrow.weight = panels_of("output_weight", output_weight, f.wide, hidden);
  f.narrow.bias = vector_of("output_bias", output_bias, hidden);
  const auto norm = [&](NormArgs& args, const char* weight_name, const Tensor& weight, const char* bias_name,
                        const Tensor& bias, double eps) {
    args.weight = reinterpret_cast<const char*>(vector_of(weight_name, weight, hidden));
    args.bias = reinterpret_cast<const char*>(vector_of(bias_name, bias, hidden));
    args.eps = eps;
  };
  norm(f.first, "attention_norm_weight", attention_norm_weight, "attention_norm_bias", attention_norm_bias,
       attention_eps);
  norm(f.second, "output_norm_weight", output_norm_weight, "output_norm_bias", output_norm_bias, output_eps);
  f.project.next = f.widen.weight;
  f.widen.gelu = true;
  f.widen.next = f.narrow.weight;
  return f;
}

void multiply(const Cpu& backend, LinearArgs args, int64_t count, const Tensor& from, int64_t inputs, const Tensor& to,
              int64_t outputs) {
  args.count = count;
  args.inputs = args.x_stride = inputs;
  args.outputs = outputs;
  args.x = floats(from);
  args.out = reinterpret_cast<float*>(out_bytes(to));
  backend.linear(args);
}

// Takes the queries of `attention` through the rest of the layer. attended, x [count, hidden] and inner [count, wide]
// are written over; the result stands in attended. `next`: the weight that is read afterwards, or null.
void finish(const Cpu& backend, const Finish& f, AttentionArgs& attention, const Tensor& residual,
            int64_t residual_stride, const Tensor& attended, const Tensor& x, const Tensor& inner, const float* next) {
  const int64_t count = attention.n_queries;
  const auto normalise = [&](NormArgs args, const Tensor& sum, const Tensor& other, int64_t other_stride) {
    args.count = count;
    args.hidden = args.x_stride = f.hidden;
    args.x = bytes_of(sum);
    args.out = out_bytes(sum);  // in place: a row is summed element by element before it is normed
    args.residual = bytes_of(other);
    args.residual_stride = other_stride;
    backend.add_layer_norm(args);
  };
  attention.out = out_bytes(attended);
  backend.attention(attention);
  multiply(backend, f.project, count, attended, f.hidden, x, f.hidden);
  normalise(f.first, x, residual, residual_stride);
  multiply(backend, f.widen, count, x, f.hidden, inner, f.wide);
  LinearArgs narrow = f.narrow;
  narrow.next = next;
  multiply(backend, narrow, count, inner, f.wide, attended, f.hidden);
  normalise(f.second, attended, x, f.hidden);
}

void read_qkv(AttentionArgs& attention, const Tensor& qkv, int64_t hidden, int64_t stride) {
  attention.dtype = DType::f32;
  attention.total = qkv.size(0);
  attention.query_stride = attention.key_stride = attention.value_stride = stride;
  attention.query = bytes_of(qkv);
  attention.key = attention.query + hidden * 4;
  attention.value = attention.key + hidden * 4;
}

Tensor floats_like(const Tensor& like, std::initializer_list<int64_t> shape) {
  return empty(like, shape, ScalarType::Float);
}

}  // namespace

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
  read_qkv(call.args, qkv, hidden, stride);
  const Cpu backend(qkv);
  plan_attention(backend, call, "qkv", qkv, hidden, cu_seqlens, rows, num_heads, scale, part, position_bias, {});
  check_dtype("residual", residual, ScalarType::Float);
  const int64_t residual_stride = row_stride("residual", residual), count = residual.size(0);
  check_shape("residual", residual, {count, hidden});
  EE_CHECK(count >= call.args.n_present, "residual must have at least ", call.args.n_present,
           " rows, one for each query, got ", count);
  call.args.n_queries = count;
  const Finish f = read_finish(hidden, attention_weight, attention_bias, attention_norm_weight, attention_norm_bias,
                               attention_eps, intermediate_weight, intermediate_bias, output_weight, output_bias,
                               output_norm_weight, output_norm_bias, output_eps);
  Tensor attended = floats_like(qkv, {count, hidden});
  const Tensor x = floats_like(qkv, {count, hidden}), inner = floats_like(qkv, {count, f.wide});
  finish(backend, f, call.args, residual, residual_stride, attended, x, inner, nullptr);
  return attended;
}

constexpr size_t kLayerTensors = 12;  // of one layer in `layers`; kernels/layer.py has the order

std::tuple<Tensor, Tensor, Tensor, Tensor> run_layers(
    const Tensor& hidden_states, const Tensor& cu_seqlens, const Tensor& threshold_logit, int64_t num_heads,
    double scale, const std::optional<Tensor>& position_bias, std::vector<Tensor> layers, std::vector<double> eps,
    std::vector<int64_t> exit_tensors, std::vector<Tensor> exits) {
  check_dtype("hidden_states", hidden_states, ScalarType::Float);
  check_dim("hidden_states", hidden_states, 2);
  check_contiguous("hidden_states", hidden_states);
  const int64_t total = hidden_states.size(0), hidden = hidden_states.size(1);
  const size_t count = layers.size() / kLayerTensors;
  EE_CHECK(count > 0 && layers.size() == count * kLayerTensors && eps.size() == 2 * count &&
               exit_tensors.size() == count,
           "layers must hold ", kLayerTensors, " tensors, eps 2 numbers and exit_tensors 1 for each layer, got ",
           layers.size(), ", ", eps.size(), " and ", exit_tensors.size());
  const Cpu backend(hidden_states);
  AttentionCall call;
  call.args.dtype = DType::f32;
  call.args.total = total;
  plan_attention(backend, call, "hidden_states", hidden_states, hidden, cu_seqlens, {}, num_heads, scale, kAll,
                 position_bias, {});
  const int64_t rows = call.args.batch;
  call.args.n_queries = total;
  const float* threshold = vector_of("threshold_logit", threshold_logit, rows);

  // Everything is read, and checked, before anything runs.
  std::vector<Finish> finishes(count);
  std::vector<LinearArgs> projections(count);
  std::vector<ExitPolicyArgs> policies(count);
  size_t at = 0;
  int64_t wide = 0;
  for (size_t l = 0; l < count; ++l) {
    const Tensor* t = layers.data() + l * kLayerTensors;
    projections[l].weight = panels_of("qkv_weight", t[0], hidden, 3 * hidden);
    projections[l].bias = vector_of("qkv_bias", t[1], 3 * hidden);
    finishes[l] = read_finish(hidden, t[2], t[3], t[4], t[5], eps[2 * l], t[6], t[7], t[8], t[9], t[10], t[11],
                              eps[2 * l + 1]);
    projections[l].next = finishes[l].project.weight;
    wide = wide < finishes[l].wide ? finishes[l].wide : wide;
    const int64_t read = exit_tensors[l];
    if (read == 0) continue;
    EE_CHECK(read == 4 || read == 6, "exit_tensors must be 0 (no exit), 4 (policy) or 6 (pooler and policy), got ",
             read);
    EE_CHECK(at + static_cast<size_t>(read) <= exits.size(), "exits must hold the sum of exit_tensors, got ",
             exits.size());
    const Tensor* e = exits.data() + at;
    at += static_cast<size_t>(read);
    ExitPolicyArgs& policy = policies[l];
    policy.count = rows;
    policy.hidden = hidden;
    const auto matrix = [](const char* name, const Tensor& tensor, int64_t n, int64_t k) {
      check_dtype(name, tensor, ScalarType::Float);
      check_shape(name, tensor, {n, k});
      check_contiguous(name, tensor);
      return bytes_of(tensor);
    };
    const auto vector = [](const char* name, const Tensor& tensor, int64_t n) {
      return reinterpret_cast<const char*>(vector_of(name, tensor, n));
    };
    if (read == 6) {
      policy.pooler_weight = matrix("pooler_weight", e[0], hidden, hidden);
      policy.pooler_bias = vector("pooler_bias", e[1], hidden);
      e += 2;
    }
    check_dim("w1", e[0], 2);
    policy.width = e[0].size(0);
    policy.w1 = matrix("w1", e[0], policy.width, hidden);
    policy.b1 = vector("b1", e[1], policy.width);
    policy.w2 = matrix("w2", e[2], 1, policy.width);
    policy.b2 = vector("b2", e[3], 1);
  }
  EE_CHECK(at == exits.size(), "exits must hold the sum of exit_tensors (", at, ") tensors, got ", exits.size());

  Tensor state = floats_like(hidden_states, {rows, hidden}), logit = floats_like(hidden_states, {rows});
  Tensor ran = empty(hidden_states, {1}, ScalarType::Int);
  float* z = reinterpret_cast<float*>(out_bytes(logit));
  const Tensor qkv = floats_like(hidden_states, {total, 3 * hidden}), x = floats_like(hidden_states, {total, hidden});
  const Tensor inner = floats_like(hidden_states, {total, wide});
  // The caller's tensor is read by the first layer; results then take turns in two of our own.
  Tensor current = hidden_states, out = floats_like(hidden_states, {total, hidden});
  Tensor spare = count > 1 ? floats_like(hidden_states, {total, hidden}) : out;
  read_qkv(call.args, qkv, hidden, 3 * hidden);
  size_t l = 0;
  bool anybody = false;
  while (l < count && !anybody) {
    multiply(backend, projections[l], total, current, hidden, qkv, 3 * hidden);
    const float* next = l + 1 < count ? projections[l + 1].weight : nullptr;
    finish(backend, finishes[l], call.args, current, hidden, out, x, inner, next);
    current = out;
    std::swap(out, spare);
    ExitPolicyArgs& policy = policies[l];
    ++l;
    if (exit_tensors[l - 1] == 0) continue;
    policy.first = bytes_of(current);
    policy.state = out_bytes(state);
    policy.logit = out_bytes(logit);
    backend.exit_policy(policy);
    for (int64_t i = 0; i < rows; ++i) anybody = anybody || z[i] > threshold[i];
  }
  if (exit_tensors[l - 1] == 0) {
    for (int64_t i = 0; i < rows; ++i) z[i] = std::numeric_limits<float>::quiet_NaN();
  }
  *reinterpret_cast<int32_t*>(out_bytes(ran)) = static_cast<int32_t>(l);
  return {std::move(current), std::move(state), std::move(logit), std::move(ran)};
}

STABLE_TORCH_LIBRARY_IMPL(consistentee, CPU, m) {
  m.impl("finish_layer", TORCH_BOX((&finish_layer)));
  m.impl("run_layers", TORCH_BOX((&run_layers)));
}

}  // namespace consistentee
