// Front end of survivors_: who stays after an exit check, in buffers that already exist.
#include <vector>

#include "apart.h"
#include "backends.h"
#include "tensor.h"
#ifdef CONSISTENTEE_WITH_CUDA
#include "cuda_backend.h"
#endif

namespace consistentee {

namespace {

const int32_t* ints(const char* name, const Tensor& tensor, int64_t count, const Tensor& keep) {
  check_shape(name, tensor, {count});
  check_dtype(name, tensor, ScalarType::Int);
  check_contiguous(name, tensor);
  check_same_device(name, tensor, "keep", keep);
  return static_cast<const int32_t*>(tensor.const_data_ptr());
}

int32_t* out_ints(const char* name, const Tensor& tensor, int64_t count, const Tensor& keep) {
  ints(name, tensor, count, keep);
  return static_cast<int32_t*>(tensor.mutable_data_ptr());
}

}  // namespace

template <class Backend>
void survivors_(const Tensor& keep, const Tensor& cu_seqlens, const Tensor& counts, const std::vector<Tensor>& state,
                const Tensor& out_cu_seqlens, const Tensor& token_dest, const Tensor& out_counts,
                const std::vector<Tensor>& out_state) {
  SurvivorsArgs args;
  check_dim("keep", keep, 1);
  const ScalarType flag = keep.scalar_type();
  EE_CHECK(flag == ScalarType::Bool || flag == ScalarType::Char || flag == ScalarType::Byte,
           "keep must be bool, int8 or uint8, got ", dtype_name(flag));
  check_contiguous("keep", keep);
  check_dim("token_dest", token_dest, 1);
  args.keep = static_cast<const uint8_t*>(keep.const_data_ptr());
  args.cap_rows = keep.size(0);
  args.cap_tokens = token_dest.size(0);
  args.cu_seqlens = ints("cu_seqlens", cu_seqlens, args.cap_rows + 1, keep);
  args.counts = ints("counts", counts, 2, keep);
  args.out_cu_seqlens = out_ints("out_cu_seqlens", out_cu_seqlens, args.cap_rows + 1, keep);
  args.token_dest = out_ints("token_dest", token_dest, args.cap_tokens, keep);
  args.out_counts = out_ints("out_counts", out_counts, 2, keep);
  std::vector<Region> regions = {
      region("keep", keep, false),
      region("cu_seqlens", cu_seqlens, false),
      region("counts", counts, false),
      region("out_cu_seqlens", out_cu_seqlens, true),
      region("token_dest", token_dest, true),
      region("out_counts", out_counts, true),
  };

  EE_CHECK(state.size() == out_state.size(), "out_state must have one tensor for each of the ", state.size(),
           " of state, got ", out_state.size());
  EE_CHECK(static_cast<int64_t>(state.size()) <= kMaxStates, "state must have at most ", kMaxStates,
           " tensors, got ", state.size());
  args.n_states = static_cast<int32_t>(state.size());
  for (size_t i = 0; i < state.size(); ++i) {
    const std::string in_name = "state[" + std::to_string(i) + "]", out_name = "out_" + in_name;
    const Tensor &in = state[i], &out = out_state[i];
    check_shape(in_name.c_str(), in, {args.cap_rows});
    check_shape(out_name.c_str(), out, {args.cap_rows});
    check_contiguous(in_name.c_str(), in);
    check_contiguous(out_name.c_str(), out);
    check_same_dtype(out_name.c_str(), out, in_name.c_str(), in);
    check_same_device(in_name.c_str(), in, "keep", keep);
    check_same_device(out_name.c_str(), out, "keep", keep);
    const int64_t bytes = static_cast<int64_t>(in.element_size());
    EE_CHECK(bytes == 4 || bytes == 8, in_name, " must have items of 4 or 8 bytes, got ", dtype_name(in.scalar_type()));
    args.states[i] = {bytes_of(in), out_bytes(out), static_cast<int32_t>(bytes)};
    regions.push_back(region(in_name, in, false));
    regions.push_back(region(out_name, out, true));
  }
  check_apart(regions);
  Backend(keep).survivors(args);
}

STABLE_TORCH_LIBRARY_IMPL(consistentee, CPU, m) { m.impl("survivors_", TORCH_BOX((&survivors_<Cpu>))); }
#ifdef CONSISTENTEE_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(consistentee, CUDA, m) { m.impl("survivors_", TORCH_BOX((&survivors_<Cuda>))); }
#endif

}  // namespace consistentee
