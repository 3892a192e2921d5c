// Front ends of exit_policy and of the two LayerNorms that stand around a layer.
#include <tuple>

#include "backends.h"
#include "tensor.h"
#ifdef CONSISTENTEE_WITH_CUDA
#include "cuda_backend.h"
#endif

namespace consistentee {

template <class Backend>
std::tuple<Tensor, Tensor> exit_policy(const Tensor& first, const std::optional<Tensor>& pooler_weight,
                                       const std::optional<Tensor>& pooler_bias, const Tensor& w1, const Tensor& b1,
                                       const Tensor& w2, const Tensor& b2) {
  ExitPolicyArgs args;
  args.dtype = float_dtype("first", first);
  check_dim("first", first, 2);
  check_contiguous("first", first);
  args.count = first.size(0);
  args.hidden = first.size(1);
  EE_CHECK(pooler_weight.has_value() == pooler_bias.has_value(),
           "pooler_weight and pooler_bias must be given together, got ",
           pooler_weight.has_value() ? "pooler_weight" : "pooler_bias", " alone");
  const auto accept = [&](const char* name, const Tensor& tensor, std::initializer_list<int64_t> shape) {
    check_shape(name, tensor, shape);
    check_contiguous(name, tensor);
    check_same_device(name, tensor, "first", first);
    return bytes_of(tensor);
  };
  if (pooler_weight.has_value()) {
    check_same_dtype("pooler_weight", *pooler_weight, "first", first);
    check_same_dtype("pooler_bias", *pooler_bias, "first", first);
    args.pooler_weight = accept("pooler_weight", *pooler_weight, {args.hidden, args.hidden});
    args.pooler_bias = accept("pooler_bias", *pooler_bias, {args.hidden});
  }
  check_dim("w1", w1, 2);
  args.width = w1.size(0);
  args.policy_dtype = float_dtype("w1", w1);
  EE_CHECK(args.policy_dtype == DType::f32 ? args.dtype != DType::f64 : args.policy_dtype == args.dtype,
           "w1 must be float32 or have the dtype of first (", dtype_name(first.scalar_type()), "), got ",
           dtype_name(w1.scalar_type()));
  check_same_dtype("b1", b1, "w1", w1);
  check_same_dtype("w2", w2, "w1", w1);
  check_same_dtype("b2", b2, "w1", w1);
  args.w1 = accept("w1", w1, {args.width, args.hidden});
  args.b1 = accept("b1", b1, {args.width});
  args.w2 = accept("w2", w2, {1, args.width});
  args.b2 = accept("b2", b2, {1});
  args.first = bytes_of(first);
  Tensor state = empty_rows(first, args.count);
  Tensor logit = empty(first, {args.count}, args.dtype == DType::f64 ? ScalarType::Double : ScalarType::Float);
  args.state = out_bytes(state);
  args.logit = out_bytes(logit);
  Backend(first).exit_policy(args);
  return {std::move(state), std::move(logit)};
}

static void norm_weights(NormArgs& args, const Tensor& weight, const Tensor& bias, const char* name,
                         const Tensor& data) {
  for (const auto& [label, tensor] : {std::pair<const char*, const Tensor&>{"weight", weight}, {"bias", bias}}) {
    check_shape(label, tensor, {args.hidden});
    check_same_dtype(label, tensor, name, data);
    check_contiguous(label, tensor);
    check_same_device(label, tensor, name, data);
  }
  args.weight = bytes_of(weight);
  args.bias = bytes_of(bias);
}

template <class Backend>
Tensor add_layer_norm(const Tensor& x, const Tensor& residual, const Tensor& weight, const Tensor& bias, double eps) {
  NormArgs args;
  args.dtype = float_dtype("x", x);
  args.x_stride = row_stride("x", x);
  args.residual_stride = row_stride("residual", residual);
  args.count = x.size(0);
  args.hidden = x.size(1);
  args.eps = eps;
  check_shape("residual", residual, {args.count, args.hidden});
  check_same_dtype("residual", residual, "x", x);
  check_same_device("residual", residual, "x", x);
  norm_weights(args, weight, bias, "x", x);
  args.x = bytes_of(x);
  args.residual = bytes_of(residual);
  Tensor out = empty(x, {args.count, args.hidden}, x.scalar_type());
  args.out = out_bytes(out);
  Backend(x).add_layer_norm(args);
  return out;
}

template <class Backend>
Tensor embed_layer_norm(const Tensor& input_ids, const std::optional<Tensor>& token_type_ids, const Tensor& positions,
                        const Tensor& word, const std::optional<Tensor>& token_type, const Tensor& position,
                        const Tensor& weight, const Tensor& bias, double eps) {
  NormArgs args;
  args.dtype = float_dtype("word", word);
  args.eps = eps;
  check_dim("word", word, 2);
  args.hidden = word.size(1);
  const auto table = [&](const char* name, const Tensor& tensor, int64_t* size) {
    check_dim(name, tensor, 2);
    EE_CHECK(tensor.size(1) == args.hidden, name, " must have rows of ", args.hidden, " as word has, got shape ",
             shape_of(tensor));
    check_same_dtype(name, tensor, "word", word);
    check_contiguous(name, tensor);
    check_same_device(name, tensor, "input_ids", input_ids);
    *size = tensor.size(0);
    return bytes_of(tensor);
  };
  args.word = table("word", word, &args.n_word);
  args.position = table("position", position, &args.n_position);
  if (token_type.has_value()) args.token_type = table("token_type", *token_type, &args.n_token_type);
  args.ids = index_view("input_ids", input_ids);
  args.count = args.ids.count;
  args.positions = index_view("positions", positions);
  check_shape("positions", positions, {args.count});
  check_same_device("positions", positions, "input_ids", input_ids);
  if (token_type_ids.has_value()) {
    EE_CHECK(token_type.has_value(), "token_type must be given where token_type_ids is");
    args.types = index_view("token_type_ids", *token_type_ids);
    check_shape("token_type_ids", *token_type_ids, {args.count});
    check_same_device("token_type_ids", *token_type_ids, "input_ids", input_ids);
  }
  norm_weights(args, weight, bias, "word", word);
  Tensor out = empty(word, {args.count, args.hidden}, word.scalar_type());
  args.out = out_bytes(out);
  Backend(word).embed_layer_norm(args);
  return out;
}

#define EE_EXIT_OPS(m, Backend)                                      \
  m.impl("exit_policy", TORCH_BOX((&exit_policy<Backend>)));         \
  m.impl("add_layer_norm", TORCH_BOX((&add_layer_norm<Backend>)));   \
  m.impl("embed_layer_norm", TORCH_BOX((&embed_layer_norm<Backend>)));

STABLE_TORCH_LIBRARY_IMPL(consistentee, CPU, m) { EE_EXIT_OPS(m, Cpu) }
#ifdef CONSISTENTEE_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(consistentee, CUDA, m) { EE_EXIT_OPS(m, Cuda) }
#endif

}  // namespace consistentee
