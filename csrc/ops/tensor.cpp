#include "tensor.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

// Lives in libtorch_cuda alone: weak, so that this library also loads where torch is a CPU build.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace consistentee {

const char* dtype_name(ScalarType type) {
  switch (type) {
    case ScalarType::Byte: return "uint8";
    case ScalarType::Char: return "int8";
    case ScalarType::Short: return "int16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Half: return "float16";
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::Bool: return "bool";
    case ScalarType::BFloat16: return "bfloat16";
    default: return "another dtype";
  }
}

static std::string write_shape(const int64_t* sizes, int64_t dim) {
  std::ostringstream text;
  text << '[';
  for (int64_t i = 0; i < dim; ++i) text << (i ? ", " : "") << sizes[i];
  text << ']';
  return text.str();
}

std::string shape_of(const Tensor& tensor) { return write_shape(tensor.sizes().data(), tensor.dim()); }

DType float_dtype(const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::Double: return DType::f64;
    case ScalarType::Half: return DType::f16;
    case ScalarType::BFloat16: return DType::bf16;
    default:
      fail<std::invalid_argument>(name, " must be float32, float64, float16 or bfloat16, got ",
                                  dtype_name(tensor.scalar_type()));
  }
}

void check_dim(const char* name, const Tensor& tensor, int64_t dim) {
  EE_CHECK(tensor.dim() == dim, name, " must have ", dim, " dimensions, got shape ", shape_of(tensor));
}

void check_shape(const char* name, const Tensor& tensor, std::initializer_list<int64_t> shape) {
  const auto sizes = tensor.sizes();
  bool equal = sizes.size() == shape.size();
  for (size_t i = 0; equal && i < shape.size(); ++i) equal = sizes[i] == shape.begin()[i];
  EE_CHECK(equal, name, " must have shape ", write_shape(shape.begin(), static_cast<int64_t>(shape.size())), ", got ",
           shape_of(tensor));
}

void check_dtype(const char* name, const Tensor& tensor, ScalarType type) {
  EE_CHECK(tensor.scalar_type() == type, name, " must be ", dtype_name(type), ", got ",
           dtype_name(tensor.scalar_type()));
}

void check_same_dtype(const char* name, const Tensor& tensor, const char* other_name, const Tensor& other) {
  EE_CHECK(tensor.scalar_type() == other.scalar_type(), name, " must have the dtype of ", other_name, " (",
           dtype_name(other.scalar_type()), "), got ", dtype_name(tensor.scalar_type()));
}

void check_contiguous(const char* name, const Tensor& tensor) {
  EE_CHECK(tensor.is_contiguous(), name, " must be contiguous, got strides ",
           write_shape(tensor.strides().data(), tensor.dim()), " for shape ", shape_of(tensor));
}

void check_same_device(const char* name, const Tensor& tensor, const char* other_name, const Tensor& other) {
  const bool cuda = tensor.is_cuda(), other_cuda = other.is_cuda();
  EE_CHECK(cuda == other_cuda && (!cuda || tensor.get_device_index() == other.get_device_index()), name,
           " must be on the device of ", other_name, " (", other_cuda ? "cuda" : "cpu", "), got ",
           cuda ? "cuda" : "cpu", cuda && other_cuda ? " with another index" : "");
}

const int32_t* cu_seqlens_data(const Tensor& cu_seqlens, int64_t* batch) {
  check_dim("cu_seqlens", cu_seqlens, 1);
  check_dtype("cu_seqlens", cu_seqlens, ScalarType::Int);
  check_contiguous("cu_seqlens", cu_seqlens);
  EE_CHECK(cu_seqlens.size(0) >= 1, "cu_seqlens must have batch + 1 entries, got none");
  *batch = cu_seqlens.size(0) - 1;
  return static_cast<const int32_t*>(cu_seqlens.const_data_ptr());
}

Index index_view(const char* name, const Tensor& index) {
  check_dim(name, index, 1);
  const ScalarType type = index.scalar_type();
  EE_CHECK(type == ScalarType::Int || type == ScalarType::Long, name, " must be int32 or int64, got ",
           dtype_name(type));
  check_contiguous(name, index);
  return {index.const_data_ptr(), index.size(0), type == ScalarType::Long};
}

Rows rows_view(const char* name, const Tensor& tensor) {
  const int64_t dim = tensor.dim();
  EE_CHECK(dim >= 1, name, " must have at least one dimension, got a scalar");
  const auto sizes = tensor.sizes();
  const auto strides = tensor.strides();
  int64_t inner = 1;
  bool dense = true;
  for (int64_t d = dim - 1; d >= 1; --d) {
    dense = dense && (sizes[d] == 1 || strides[d] == inner);
    inner *= sizes[d];
  }
  EE_CHECK(dense || tensor.numel() == 0, name, " must be contiguous within each row, got strides ",
           write_shape(strides.data(), dim), " for shape ", shape_of(tensor));
  const int64_t item = static_cast<int64_t>(tensor.element_size());
  return {bytes_of(tensor), sizes[0], inner * item, strides[0] * item};
}

int64_t row_stride(const char* name, const Tensor& tensor) {
  check_dim(name, tensor, 2);
  EE_CHECK(tensor.size(1) <= 1 || tensor.stride(1) == 1 || tensor.numel() == 0, name,
           " must be contiguous in its last dimension, got strides ", write_shape(tensor.strides().data(), 2));
  return tensor.stride(0);
}

Tensor empty_sizes(const Tensor& like, const int64_t* sizes, int64_t dim, ScalarType type) {
  EE_CHECK(dim <= kMaxDim, "tensors of more than ", kMaxDim, " dimensions are not served, got ", dim);
  int64_t strides[kMaxDim];
  int64_t step = 1;
  for (int64_t d = dim - 1; d >= 0; --d) {
    strides[d] = step;
    step *= sizes[d] > 0 ? sizes[d] : 1;
  }
  const int32_t dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  int32_t device_type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  const int32_t device_index = like.is_cuda() ? like.get_device_index() : 0;
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dim, sizes, strides, dtype, device_type, device_index, &handle));
  return Tensor(handle);
}

Tensor empty(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType type) {
  return empty_sizes(like, shape.begin(), static_cast<int64_t>(shape.size()), type);
}

Tensor empty_rows(const Tensor& like, int64_t count) {
  int64_t sizes[kMaxDim];
  const int64_t dim = like.dim();
  for (int64_t d = 0; d < dim && d < kMaxDim; ++d) sizes[d] = like.size(d);
  sizes[0] = count;
  int32_t dtype = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  return empty_sizes(like, sizes, dim, torch::stable::detail::to<ScalarType>(torch::stable::detail::from(dtype)));
}

void* cuda_stream(const Tensor& tensor) {
  if (&aoti_torch_get_current_cuda_stream == nullptr) {
    fail<std::runtime_error>("this torch has no CUDA: install a CUDA build of torch, or keep the tensors on the CPU");
  }
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return stream;
}

}  // namespace consistentee
