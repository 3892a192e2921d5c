// cuda:: behind the interface of Cpu: device guard, current stream, errors as exceptions.
#pragma once
#include "backends.h"
#include "tensor.h"

namespace consistentee {

class Cuda {
 public:
  static constexpr bool kHostSeesValues = false;

  explicit Cuda(const Tensor& tensor) : guard_(tensor.get_device_index()), stream_(cuda_stream(tensor)) {}

  void prefix_sum(const int32_t* lengths, int64_t batch, int32_t* cu_seqlens) const {
    check(cuda::prefix_sum(lengths, batch, cu_seqlens, stream_));
  }
  int64_t read_int(const int32_t* value) const {
    int32_t result = 0;
    check(cuda::read_int(value, &result, stream_));
    return result;
  }
  void compact(const CompactArgs& args) const { check(cuda::compact(args, stream_)); }
  void survivors(const SurvivorsArgs& args) const { check(cuda::survivors(args, stream_)); }
  void step_rows(const StepRowsArgs& args) const { check(cuda::step_rows(args, stream_)); }
  void gather(const GatherArgs& args) const { check(cuda::gather(args, stream_)); }
  void scatter(const ScatterArgs& args) const { check(cuda::scatter(args, stream_)); }
  void pack_lead(const LeadArgs& args) const { check(cuda::pack_lead(args, stream_)); }
  void unpack_lead(const LeadArgs& args) const { check(cuda::unpack_lead(args, stream_)); }
  void row_offsets(const AttentionArgs& args, int32_t* offsets) const {
    if (offsets != nullptr) check(cuda::row_offsets(args, offsets, stream_));
  }
  void attention(const AttentionArgs& args) const { check(cuda::attention(args, stream_)); }
  void exit_policy(const ExitPolicyArgs& args) const { check(cuda::exit_policy(args, stream_)); }
  void add_layer_norm(const NormArgs& args) const { check(cuda::add_layer_norm(args, stream_)); }
  void embed_layer_norm(const NormArgs& args) const { check(cuda::embed_layer_norm(args, stream_)); }

 private:
  static void check(const char* error) {
    if (__builtin_expect(error != nullptr, 0)) fail<std::runtime_error>("CUDA: ", error);
  }
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_;
};

}  // namespace consistentee
