// Torch's stable ABI, narrowed to what the ops need: checks that read as sentences, row views, allocation.
#pragma once
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <initializer_list>
#include <optional>
#include <string>

#include "args.h"
#include "fail.h"

namespace consistentee {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

std::string shape_of(const Tensor& tensor);
const char* dtype_name(ScalarType type);

// The float dtypes of the arithmetic ops; anything else is an error that names the tensor.
DType float_dtype(const char* name, const Tensor& tensor);

void check_dim(const char* name, const Tensor& tensor, int64_t dim);
void check_shape(const char* name, const Tensor& tensor, std::initializer_list<int64_t> shape);
void check_dtype(const char* name, const Tensor& tensor, ScalarType type);
void check_same_dtype(const char* name, const Tensor& tensor, const char* other_name, const Tensor& other);
void check_contiguous(const char* name, const Tensor& tensor);
void check_same_device(const char* name, const Tensor& tensor, const char* other_name, const Tensor& other);

// (batch + 1,) int32; its values are checked by the CPU backend only, which can read them without waiting.
const int32_t* cu_seqlens_data(const Tensor& cu_seqlens, int64_t* batch);
Index index_view(const char* name, const Tensor& index);
// Rows along dimension 0, each contiguous, at any distance from each other.
Rows rows_view(const char* name, const Tensor& tensor);
// Row stride in elements of a 2-D tensor whose last dimension is contiguous.
int64_t row_stride(const char* name, const Tensor& tensor);

inline const char* bytes_of(const Tensor& tensor) { return static_cast<const char*>(tensor.const_data_ptr()); }
inline char* out_bytes(const Tensor& tensor) { return static_cast<char*>(tensor.mutable_data_ptr()); }

constexpr int64_t kMaxDim = 16;

// Uninitialised, contiguous, on the device of `like`. Straight to the shim: new_empty through the dispatcher boxes
// six arguments and costs about a microsecond at batch 1.
Tensor empty(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType type);
// The shape of `like` with dimension 0 replaced by `count`.
Tensor empty_rows(const Tensor& like, int64_t count);
Tensor empty_sizes(const Tensor& like, const int64_t* sizes, int64_t dim, ScalarType type);

void* cuda_stream(const Tensor& tensor);

}  // namespace consistentee
