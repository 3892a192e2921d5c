// Operands of products on packed weights, checked: fp32, on the CPU.
#pragma once
#include "tensor.h"

namespace consistentee {

inline const float* floats(const Tensor& tensor) { return reinterpret_cast<const float*>(bytes_of(tensor)); }

inline const float* vector_of(const char* name, const Tensor& tensor, int64_t size) {
  check_dtype(name, tensor, ScalarType::Float);
  check_shape(name, tensor, {size});
  check_contiguous(name, tensor);
  return floats(tensor);
}

inline const float* panels_of(const char* name, const Tensor& weight, int64_t inputs, int64_t outputs) {
  check_dtype(name, weight, ScalarType::Float);
  check_shape(name, weight, {(outputs + kPanel - 1) / kPanel, inputs, kPanel});
  check_contiguous(name, weight);
  return floats(weight);
}

}  // namespace consistentee
