// Front end of lead_attention.
#include "attention.h"
#ifdef CONSISTENTEE_WITH_CUDA
#include "cuda_backend.h"
#endif

namespace consistentee {

template <class Backend>
Tensor lead_attention(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& cu_seqlens,
                      const std::optional<Tensor>& rows, int64_t num_heads, double scale, int64_t part,
                      const std::optional<Tensor>& position_bias, std::optional<int64_t> num_queries) {
  AttentionCall call;
  AttentionArgs& args = call.args;
  args.dtype = float_dtype("query", query);
  args.query_stride = row_stride("query", query);
  args.key_stride = row_stride("key", key);
  args.value_stride = row_stride("value", value);
  args.total = query.size(0);
  const int64_t hidden = query.size(1);
  check_shape("key", key, {args.total, hidden});
  check_shape("value", value, {args.total, hidden});
  check_same_dtype("key", key, "query", query);
  check_same_dtype("value", value, "query", query);
  check_same_device("key", key, "query", query);
  check_same_device("value", value, "query", query);
  args.query = bytes_of(query);
  args.key = bytes_of(key);
  args.value = bytes_of(value);
  const Backend backend(query);
  plan_attention(backend, call, "query", query, hidden, cu_seqlens, rows, num_heads, scale, part, position_bias,
                 num_queries);
  Tensor out = empty(query, {args.n_queries, hidden}, query.scalar_type());
  args.out = out_bytes(out);
  backend.attention(args);
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(consistentee, CPU, m) { m.impl("lead_attention", TORCH_BOX((&lead_attention<Cpu>))); }
#ifdef CONSISTENTEE_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(consistentee, CUDA, m) { m.impl("lead_attention", TORCH_BOX((&lead_attention<Cuda>))); }
#endif

}  // namespace consistentee
