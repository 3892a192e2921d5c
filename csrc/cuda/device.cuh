// Shared by the CUDA kernels: dtype traits, warp and block reductions, searches in cu_seqlens, launch helpers.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <utility>

#include "args.h"
#include "backends.h"

namespace consistentee {
namespace cuda {

// What went wrong, or null. The runtime remembers its last error until somebody asks: once said, it is nobody's any more.
inline const char* error_text(cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();
  return cudaGetErrorString(error);
}
inline const char* launch_error() { return error_text(cudaGetLastError()); }
inline unsigned blocks_for(int64_t items, int64_t per_block) {
  return static_cast<unsigned>((items + per_block - 1) / per_block);
}
inline cudaStream_t as_stream(void* stream) { return static_cast<cudaStream_t>(stream); }

// Programmatic dependent launch: a kernel may start while the one in front of it in the stream ends. Such a kernel calls
// this before it reads anything that the one in front writes, and lets the one behind start as soon as there is room.
// Every program calls it, before it returns or writes anything: so whoever starts behind it knows that the kernels
// further in front have ended, and may read what those wrote at once, past the first level of cache (__ldcg), which
// nobody has cleared meanwhile. Nothing on older devices.
__device__ inline void wait_for_kernel_in_front() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
template <class... Parameters, class... Arguments>
const char* launch_early(void (*kernel)(Parameters...), dim3 blocks, unsigned threads, size_t shared, void* stream,
                         Arguments&&... arguments) {
  int device = 0, major = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error != cudaSuccess) return error_text(error);
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = major >= 9;
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = threads;
  config.dynamicSmemBytes = shared;
  config.stream = as_stream(stream);
  config.attrs = &attribute;
  config.numAttrs = 1;
  return error_text(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...));
}

inline const char* count_multiprocessors(int* count) {
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device);
  return error_text(error);
}

// Programs that need little shared memory would crowd on whichever multiprocessors the kernel in front leaves first,
// while others stay empty: each asks for an even share of one, but at least for what it needs, and the kernel may have
// it.
inline const char* even_share(const void* kernel, int64_t programs, int64_t needed, size_t* shared) {
  int device = 0, multiprocessors = 0, memory = 0, reserved = 0;
  if (const char* text = count_multiprocessors(&multiprocessors)) return text;
  cudaFuncAttributes attributes;
  cudaError_t error = cudaGetDevice(&device);
  const auto ask = [&](int* value, cudaDeviceAttr attribute) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(value, attribute, device);
  };
  ask(&memory, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  ask(&reserved, cudaDevAttrReservedSharedMemoryPerBlock);
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, kernel);
  if (error != cudaSuccess) return error_text(error);
  const auto share_of = [&](int64_t sharers) {  // in the 128 bytes of which shared memory is given
    return memory / sharers / 128 * 128 - reserved - static_cast<int64_t>(attributes.sharedSizeBytes);
  };
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(share_of(1)));
  const int64_t share = share_of((programs + multiprocessors - 1) / multiprocessors);
  *shared = static_cast<size_t>(share > needed ? share : needed);
  return error_text(error);
}

// Arithmetic type of a storage type: fp32, or fp64 for fp64.
template <class T>
struct Wide {
  using type = float;
};
template <>
struct Wide<double> {
  using type = double;
};
template <class T>
using wide_t = typename Wide<T>::type;

__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline void narrow(float* out, float x) { *out = x; }
__device__ inline void narrow(double* out, double x) { *out = x; }
__device__ inline void narrow(__half* out, float x) { *out = __float2half_rn(x); }
__device__ inline void narrow(__nv_bfloat16* out, float x) { *out = __float2bfloat16_rn(x); }

__device__ inline float exp_of(float x) { return expf(x); }
__device__ inline double exp_of(double x) { return exp(x); }
__device__ inline float tanh_of(float x) { return tanhf(x); }
__device__ inline double tanh_of(double x) { return tanh(x); }
__device__ inline float gelu_of(float x) { return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f)); }
__device__ inline double gelu_of(double x) { return 0.5 * x * (1.0 + erf(x * 0.70710678118654752440)); }

template <class A>
__device__ inline A warp_sum(A x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}
// Sum over the block, returned to every thread; `shared` holds one value for each warp.
template <class A>
__device__ inline A block_sum(A x, A* shared) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  x = warp_sum(x);
  __syncthreads();  // the previous use of `shared`
  if (lane == 0) shared[warp] = x;
  __syncthreads();
  A total = 0;
  for (int i = 0; i < warps; ++i) total += shared[i];
  return total;
}

// The last j in [0, count) with start(j) <= at; start never falls, start(0) <= at.
template <class Start>
__device__ inline int64_t last_at_or_before(int64_t count, int64_t at, Start start) {
  int64_t low = 0, high = count;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (start(middle) <= at) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

__device__ inline int64_t index_at(const Index& index, int64_t i) {
  return index.wide ? static_cast<const int64_t*>(index.data)[i] : static_cast<const int32_t*>(index.data)[i];
}

// Calls f with a null pointer of the storage type.
template <class F>
const char* with_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f64: return f(static_cast<const double*>(nullptr));
    case DType::f16: return f(static_cast<const __half*>(nullptr));
    case DType::bf16: return f(static_cast<const __nv_bfloat16*>(nullptr));
    default: return f(static_cast<const float*>(nullptr));
  }
}

}  // namespace cuda
}  // namespace consistentee
