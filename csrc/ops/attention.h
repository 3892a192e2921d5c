// What lead_attention and finish_layer check alike.
#pragma once
#include "backends.h"
#include "tensor.h"

namespace consistentee {

struct AttentionCall {
  AttentionArgs args;
  std::optional<Tensor> offsets;  // holds what args.offsets points to
};

// Reads everything but query, key, value and the output. `query` stands for their device and dtype, `name` is its name;
// args.total and args.dtype are set. num_queries is there where the caller announces the rows of the result.
template <class Backend>
void plan_attention(const Backend& backend, AttentionCall& call, const char* name, const Tensor& query, int64_t hidden,
                    const Tensor& cu_seqlens, const std::optional<Tensor>& rows, int64_t num_heads, double scale,
                    int64_t part, const std::optional<Tensor>& position_bias, std::optional<int64_t> num_queries) {
  AttentionArgs& args = call.args;
  check_same_device("cu_seqlens", cu_seqlens, name, query);
  EE_CHECK(num_heads >= 1 && hidden % num_heads == 0, "num_heads must divide the width of query, got ", num_heads,
           " for a width of ", hidden);
  EE_CHECK(part >= kFirst && part <= kAll, "part must be 0 (first tokens), 1 (other tokens) or 2 (all), got ", part);
  args.num_heads = num_heads;
  args.head_dim = hidden / num_heads;
  args.scale = scale;
  args.part = static_cast<int32_t>(part);
  args.cu_seqlens = cu_seqlens_data(cu_seqlens, &args.batch);
  args.n_rows = args.batch;
  if (rows.has_value()) {
    check_dim("rows", *rows, 1);
    check_dtype("rows", *rows, ScalarType::Int);
    check_contiguous("rows", *rows);
    check_same_device("rows", *rows, name, query);
    args.rows = static_cast<const int32_t*>(rows->const_data_ptr());
    args.n_rows = rows->size(0);
    if (part != kFirst) {
      call.offsets = empty(query, {args.n_rows + 1}, ScalarType::Int);
      args.offsets = static_cast<const int32_t*>(call.offsets->const_data_ptr());
    }
  }
  if (position_bias.has_value()) {
    const Tensor& bias = *position_bias;
    check_dim("position_bias", bias, 2);
    check_contiguous("position_bias", bias);
    check_same_device("position_bias", bias, name, query);
    EE_CHECK(bias.size(0) == num_heads && bias.size(1) % 2 == 1,
             "position_bias must be [num_heads, 2 * M - 1] with M >= the longest length, got ", shape_of(bias),
             " for num_heads ", num_heads);
    args.bias_dtype = float_dtype("position_bias", bias);
    EE_CHECK(args.bias_dtype == DType::f32 || args.bias_dtype == args.dtype,
             "position_bias must be float32 or have the dtype of ", name, ", got ", dtype_name(bias.scalar_type()));
    args.bias = bytes_of(bias);
    args.bias_span = (bias.size(1) + 1) / 2;
  }
  backend.row_offsets(args, const_cast<int32_t*>(args.offsets));
  // The number of queries is a value on the device: there, a caller who announces it saves the wait.
  int64_t present;
  if (part == kFirst) {
    present = args.n_rows;
  } else if (num_queries.has_value() && !Backend::kHostSeesValues) {
    present = *num_queries;
  } else if (args.offsets != nullptr) {
    present = backend.read_int(args.offsets + args.n_rows) + (part == kAll ? args.n_rows : 0);
  } else {
    const int64_t total = Backend::kHostSeesValues ? backend.read_int(args.cu_seqlens + args.batch) : args.total;
    present = part == kAll ? total : total - args.batch;
  }
  args.n_queries = num_queries.value_or(present);
  EE_CHECK(args.n_queries >= present, "num_queries must be at least ", present, " for these rows, got ",
           args.n_queries);
  args.n_present = present;
}

}  // namespace consistentee
