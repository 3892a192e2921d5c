// Front end of packed_linear, which only the CPU has: elsewhere its torch twin serves.
#include "linear.h"

#include "backends.h"

namespace consistentee {

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

STABLE_TORCH_LIBRARY_IMPL(consistentee, CPU, m) {
  m.impl("packed_linear", TORCH_BOX((&packed_linear)));
}

}  // namespace consistentee
