// Front ends of the ops that move rows: checks, allocation, then the backend.
#include <tuple>

#include "backends.h"
#include "tensor.h"
#ifdef CONSISTENTEE_WITH_CUDA
#include "cuda_backend.h"
#endif

namespace consistentee {

static int32_t* int_data(const Tensor& tensor) { return static_cast<int32_t*>(tensor.mutable_data_ptr()); }

static const int32_t* lengths_data(const Tensor& lengths) {
  check_dim("lengths", lengths, 1);
  check_dtype("lengths", lengths, ScalarType::Int);
  check_contiguous("lengths", lengths);
  return static_cast<const int32_t*>(lengths.const_data_ptr());
}

template <class Backend>
Tensor prefix_sum(const Tensor& lengths) {
  const int32_t* data = lengths_data(lengths);
  Tensor cu_seqlens = empty(lengths, {lengths.size(0) + 1}, ScalarType::Int);
  Backend(lengths).prefix_sum(data, lengths.size(0), int_data(cu_seqlens));
  return cu_seqlens;
}

template <class Backend, Layout layout>
std::tuple<Tensor, Tensor, Tensor, Tensor> compact(const Tensor& hidden_states, const Tensor& cu_seqlens,
                                                   const Tensor& keep) {
  CompactArgs args;
  args.layout = layout;
  args.in = rows_view("hidden_states", hidden_states);
  args.cu_seqlens = cu_seqlens_data(cu_seqlens, &args.batch);
  check_shape("keep", keep, {args.batch});
  check_dtype("keep", keep, ScalarType::Bool);
  check_contiguous("keep", keep);
  check_same_device("cu_seqlens", cu_seqlens, "hidden_states", hidden_states);
  check_same_device("keep", keep, "hidden_states", hidden_states);
  args.keep = static_cast<const bool*>(keep.const_data_ptr());
  Tensor out = empty_rows(hidden_states, args.in.count);
  Tensor out_cu_seqlens = empty(hidden_states, {args.batch + 1}, ScalarType::Int);
  Tensor active_rows = empty(hidden_states, {args.batch}, ScalarType::Int);
  Tensor n_active = empty(hidden_states, {1}, ScalarType::Int);
  args.out = out_bytes(out);
  args.out_cu_seqlens = int_data(out_cu_seqlens);
  args.active_rows = int_data(active_rows);
  args.n_active = int_data(n_active);
  Backend(hidden_states).compact(args);
  return {std::move(out), std::move(out_cu_seqlens), std::move(active_rows), std::move(n_active)};
}

template <class Backend>
Tensor gather_rows(const Tensor& x, const Tensor& index) {
  GatherArgs args;
  args.in = rows_view("x", x);
  args.index = index_view("index", index);
  check_same_device("index", index, "x", x);
  Tensor out = empty_rows(x, args.index.count);
  args.out = out_bytes(out);
  Backend(x).gather(args);
  return out;
}

template <class Backend>
void scatter_rows_(const Tensor& out, const Tensor& src, const Tensor& index) {
  ScatterArgs args;
  const Rows rows = rows_view("out", out);
  args.in = rows_view("src", src);
  args.index = index_view("index", index);
  check_same_device("src", src, "out", out);
  check_same_device("index", index, "out", out);
  check_same_dtype("src", src, "out", out);
  EE_CHECK(args.in.count == args.index.count, "src must have one row for each of the ", args.index.count,
           " entries of index, got shape ", shape_of(src));
  bool same = src.dim() == out.dim();
  for (int64_t d = 1; same && d < out.dim(); ++d) same = src.size(d) == out.size(d);
  EE_CHECK(same, "src must have rows of the shape of out's, got ", shape_of(src), " for ", shape_of(out));
  args.out = out_bytes(out);
  args.out_count = rows.count;
  args.out_stride = rows.stride;
  Backend(out).scatter(args);
}

template <class Backend>
Tensor pack_lead(const Tensor& padded, const Tensor& lengths, std::optional<int64_t> total_tokens) {
  EE_CHECK(padded.dim() >= 2 && padded.dim() <= kMaxDim, "padded must be [batch, max_seqlen, ...], got shape ",
           shape_of(padded));
  check_contiguous("padded", padded);
  check_shape("lengths", lengths, {padded.size(0)});
  check_same_device("lengths", lengths, "padded", padded);
  LeadArgs args;
  args.batch = padded.size(0);
  args.max_seqlen = padded.size(1);
  const Backend backend(padded);
  Tensor cu_seqlens = empty(padded, {args.batch + 1}, ScalarType::Int);
  backend.prefix_sum(lengths_data(lengths), args.batch, int_data(cu_seqlens));
  args.cu_seqlens = int_data(cu_seqlens);
  args.total = total_tokens.has_value() ? *total_tokens : backend.read_int(args.cu_seqlens + args.batch);
  int64_t sizes[kMaxDim];
  sizes[0] = args.total;
  args.row_bytes = static_cast<int64_t>(padded.element_size());
  for (int64_t d = 2; d < padded.dim(); ++d) {
    sizes[d - 1] = padded.size(d);
    args.row_bytes *= sizes[d - 1];
  }
  Tensor out = empty_sizes(padded, sizes, padded.dim() - 1, padded.scalar_type());
  args.in = bytes_of(padded);
  args.out = out_bytes(out);
  backend.pack_lead(args);
  return out;
}

template <class Backend>
Tensor unpack_lead(const Tensor& packed, const Tensor& cu_seqlens, int64_t max_seqlen) {
  EE_CHECK(packed.dim() >= 1 && packed.dim() < kMaxDim, "packed must be [total_tokens, ...], got shape ",
           shape_of(packed));
  check_contiguous("packed", packed);
  check_same_device("cu_seqlens", cu_seqlens, "packed", packed);
  EE_CHECK(max_seqlen >= 0, "max_seqlen must not be negative, got ", max_seqlen);
  LeadArgs args;
  args.cu_seqlens = cu_seqlens_data(cu_seqlens, &args.batch);
  args.total = packed.size(0);
  args.max_seqlen = max_seqlen;
  int64_t sizes[kMaxDim];
  sizes[0] = args.batch;
  sizes[1] = max_seqlen;
  args.row_bytes = static_cast<int64_t>(packed.element_size());
  for (int64_t d = 1; d < packed.dim(); ++d) {
    sizes[d + 1] = packed.size(d);
    args.row_bytes *= packed.size(d);
  }
  Tensor out = empty_sizes(packed, sizes, packed.dim() + 1, packed.scalar_type());
  args.in = bytes_of(packed);
  args.out = out_bytes(out);
  Backend(packed).unpack_lead(args);
  return out;
}

#define EE_PACKING_OPS(m, Backend)                                           \
  m.impl("prefix_sum", TORCH_BOX((&prefix_sum<Backend>)));                   \
  m.impl("compact_rows", TORCH_BOX((&compact<Backend, Layout::rows>)));      \
  m.impl("compact_lead", TORCH_BOX((&compact<Backend, Layout::lead>)));      \
  m.impl("gather_rows", TORCH_BOX((&gather_rows<Backend>)));                 \
  m.impl("scatter_rows_", TORCH_BOX((&scatter_rows_<Backend>)));             \
  m.impl("pack_lead", TORCH_BOX((&pack_lead<Backend>)));                     \
  m.impl("unpack_lead", TORCH_BOX((&unpack_lead<Backend>)));

STABLE_TORCH_LIBRARY_IMPL(consistentee, CPU, m) { EE_PACKING_OPS(m, Cpu) }
#ifdef CONSISTENTEE_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(consistentee, CUDA, m) { EE_PACKING_OPS(m, Cuda) }
#endif

}  // namespace consistentee
