// The two backends behind one interface: an op's front end checks its tensors once and is compiled for each of them.
#pragma once
#include "args.h"

namespace consistentee {

// Values the host can see (lengths, indices, ids) are checked here, and only here.
struct Cpu {
  static constexpr bool kHostSeesValues = true;

  template <class Tensor>
  explicit Cpu(const Tensor&) {}

  void prefix_sum(const int32_t* lengths, int64_t batch, int32_t* cu_seqlens) const;
  int64_t read_int(const int32_t* value) const { return *value; }
  void compact(const CompactArgs& args) const;
  void survivors(const SurvivorsArgs& args) const;
  void step_rows(const StepRowsArgs& args) const;
  void gather(const GatherArgs& args) const;
  void scatter(const ScatterArgs& args) const;
  void pack_lead(const LeadArgs& args) const;
  void unpack_lead(const LeadArgs& args) const;
  void row_offsets(const AttentionArgs& args, int32_t* offsets) const;
  void attention(const AttentionArgs& args) const;
  void exit_policy(const ExitPolicyArgs& args) const;
  void linear(const LinearArgs& args) const;  // the CPU's alone
  void add_layer_norm(const NormArgs& args) const;
  void embed_layer_norm(const NormArgs& args) const;
  // The CPU's alone, too:
  void rms_norm(const RmsNormArgs& args) const;
  void swiglu(const float* gate_up, int64_t count, int64_t width, float* out) const;  // [count, 2 width] -> [count, width]
  void decode_attention(const DecodeAttentionArgs& args) const;
};

// Each enqueues on `stream` and returns null, or the CUDA runtime's own words for what went wrong.
// read_int waits for the device; nothing else does.
namespace cuda {
const char* prefix_sum(const int32_t* lengths, int64_t batch, int32_t* cu_seqlens, void* stream);
const char* read_int(const int32_t* value, int32_t* result, void* stream);
const char* compact(const CompactArgs& args, void* stream);
const char* survivors(const SurvivorsArgs& args, void* stream);
const char* step_rows(const StepRowsArgs& args, void* stream);
const char* gather(const GatherArgs& args, void* stream);
const char* scatter(const ScatterArgs& args, void* stream);
const char* pack_lead(const LeadArgs& args, void* stream);
const char* unpack_lead(const LeadArgs& args, void* stream);
const char* row_offsets(const AttentionArgs& args, int32_t* offsets, void* stream);
const char* attention(const AttentionArgs& args, void* stream);
const char* exit_policy(const ExitPolicyArgs& args, void* stream);
const char* add_layer_norm(const NormArgs& args, void* stream);
const char* embed_layer_norm(const NormArgs& args, void* stream);
}  // namespace cuda

}  // namespace consistentee
