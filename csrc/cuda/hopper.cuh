// Hopper's copy engine (TMA), the maps it reads, barriers in shared memory and what matrix instructions need around
// them (the instructions themselves: wgmma.cuh), a function each.
#pragma once
#include <cuda.h>

#include <cstdio>

#include "device.cuh"
#include "wgmma.cuh"

#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
#error "these instructions are those of sm_90a alone: name the source *_sm90a.cu (setup.py, ARCH_SPECIFIC)"
#endif

namespace consistentee {
namespace cuda {

__device__ inline uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

__device__ inline void barrier_init(uint64_t* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals));
}
__device__ inline void barrier_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
__device__ inline void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
__device__ inline void barrier_wait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra ready;\n"
      "bra again;\n"
      "ready:\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}
__device__ inline void copy_tile(void* to, const CUtensorMap* map, uint64_t* barrier, int32_t column, int32_t row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
          shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(row)
      : "memory");
}
// Rows of 128 or 64 bytes in groups of 8, swizzled. With K innermost a step of 16 along it is 32 bytes further, else 16
// rows.
template <int kRowBytes = 128>
__device__ inline uint64_t tile_descriptor(const char* tile) {
  static_assert(kRowBytes == 128 || kRowBytes == 64);
  return (static_cast<uint64_t>(shared_address(tile) & 0x3ffff) >> 4) | (1ull << 16) |
         (static_cast<uint64_t>(kRowBytes / 2) << 32) | ((kRowBytes == 128 ? 1ull : 2ull) << 62);
}
__device__ inline void warpgroup_arrive() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void warpgroup_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ inline void warpgroup_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
__device__ inline void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
// The half of it that does not wait.
__device__ inline void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                            const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                            CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// The driver's function of that name, null where it has none; or what went wrong.
inline const char* driver_function(const char* name, void** found) {
  cudaDriverEntryPointQueryResult state;
#if CUDART_VERSION >= 12050
  return error_text(cudaGetDriverEntryPointByVersion(name, found, 12000, cudaEnableDefault, &state));
#else
  return error_text(cudaGetDriverEntryPoint(name, found, cudaEnableDefault, &state));
#endif
}

inline const char* encoder(Encode* encode) {
  static void* found = nullptr;
  if (found == nullptr) {
    if (const char* error = driver_function("cuTensorMapEncodeTiled", &found)) return error;
    if (found == nullptr) return "the driver has no cuTensorMapEncodeTiled: it is older than CUDA 12";
  }
  *encode = reinterpret_cast<Encode>(found);
  return nullptr;
}

// Why there is no map, in the driver's words where it has some. The thread's own text, until it asks again.
inline const char* refusal(CUresult result) {
  thread_local char text[256];
  const char* const sentence = "cuTensorMapEncodeTiled refused the operand's address, size or stride";
  const char* said = nullptr;
  void* found = nullptr;
  if (driver_function("cuGetErrorString", &found) == nullptr && found != nullptr) {
    reinterpret_cast<CUresult (*)(CUresult, const char**)>(found)(result, &said);
  }
  if (said != nullptr) {
    std::snprintf(text, sizeof text, "%s: %s", sentence, said);
  } else {
    std::snprintf(text, sizeof text, "%s: error %d of the driver", sentence, static_cast<int>(result));
  }
  return text;
}

// The map of a matrix of 16-bit floats with `columns` innermost, copied in boxes of 128 bytes a row (or half of it),
// swizzled; zeros beyond its end. Null, or what went wrong.
inline const char* encode_map(CUtensorMap* map, const void* data, int64_t rows, int64_t columns, int64_t stride,
                              int box_rows, bool bfloat16, int box_columns = 64) {
  Encode encode;
  if (const char* error = encoder(&encode)) return error;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(stride) * 2};
  const cuuint32_t box[2] = {static_cast<cuuint32_t>(box_columns), static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[2] = {1, 1};
  const CUresult result = encode(map, bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2,
                                 const_cast<void*>(data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                                 box_columns == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? nullptr : refusal(result);
}

}  // namespace cuda
}  // namespace consistentee
