// Row movement on CUDA. Limited by bytes: every moved row is read once and written once, in 16-byte pieces where
// addresses and widths allow. One warp a row; counts are read from device memory, so no launch waits for the host.
#include "scan.cuh"

namespace consistentee {
namespace cuda {

constexpr int kWarps = 8;  // rows of one block

template <class Piece>
__device__ void copy_pieces(char* out, const char* in, int64_t bytes, int lane) {
  const int64_t count = bytes / static_cast<int64_t>(sizeof(Piece));
  for (int64_t i = lane; i < count; i += 32) reinterpret_cast<Piece*>(out)[i] = reinterpret_cast<const Piece*>(in)[i];
}

// `unit`: the widest piece that divides every address, stride and width of the launch.
__device__ void copy_row(char* out, const char* in, int64_t bytes, int unit, int lane) {
  if (unit == 16) {
    copy_pieces<int4>(out, in, bytes, lane);
  } else if (unit == 4) {
    copy_pieces<int32_t>(out, in, bytes, lane);
  } else {
    copy_pieces<char>(out, in, bytes, lane);
  }
}
__device__ void clear_row(char* out, int64_t bytes, int unit, int lane) {
  if (unit == 16) {
    for (int64_t i = lane; i < bytes / 16; i += 32) reinterpret_cast<int4*>(out)[i] = make_int4(0, 0, 0, 0);
  } else {
    for (int64_t i = lane; i < bytes; i += 32) out[i] = 0;
  }
}

static int unit_of(const void* a, const void* b, int64_t bytes, int64_t stride_a, int64_t stride_b) {
  const uint64_t bits = reinterpret_cast<uint64_t>(a) | reinterpret_cast<uint64_t>(b) | static_cast<uint64_t>(bytes) |
                        static_cast<uint64_t>(stride_a) | static_cast<uint64_t>(stride_b);
  return bits % 16 == 0 ? 16 : bits % 4 == 0 ? 4 : 1;
}

__device__ inline int64_t row_of_warp() { return static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32; }

// --- prefix sums and compaction ------------------------------------------------------------------------------------

__global__ void prefix_sum_kernel(const int32_t* lengths, int64_t batch, int32_t* cu_seqlens) {
  const int32_t total = block_scan<int32_t>(
      batch, 0, [&](int64_t i) { return lengths[i]; }, [&](int64_t i, int32_t before) { cu_seqlens[i] = before; });
  if (threadIdx.x == 0) cu_seqlens[batch] = total;
}

const char* prefix_sum(const int32_t* lengths, int64_t batch, int32_t* cu_seqlens, void* stream) {
  prefix_sum_kernel<<<1, kScanThreads, 0, as_stream(stream)>>>(lengths, batch, cu_seqlens);
  return launch_error();
}

__global__ void survivors_kernel(CompactArgs args) {
  const Pair total = block_scan<Pair>(
      args.batch, Pair{0, 0},
      [&](int64_t i) {
        return args.keep[i] ? Pair{1, args.cu_seqlens[i + 1] - args.cu_seqlens[i]} : Pair{0, 0};
      },
      [&](int64_t i, Pair before) {
        if (args.keep[i]) {
          args.active_rows[before.rows] = static_cast<int32_t>(i);
          args.out_cu_seqlens[before.rows] = before.tokens;
        }
      });
  for (int64_t i = total.rows + threadIdx.x; i <= args.batch; i += kScanThreads) {
    args.out_cu_seqlens[i] = total.tokens;
    if (i < args.batch) args.active_rows[i] = -1;
  }
  if (threadIdx.x == 0) *args.n_active = total.rows;
}

__global__ void move_survivors_kernel(CompactArgs args, int unit) {
  const int64_t row = row_of_warp();
  const int32_t* cu = args.out_cu_seqlens;
  if (row >= cu[args.batch] || row >= args.in.count) return;
  int64_t source;
  if (args.layout == Layout::rows) {
    // Searching all of cu, the repeated total at its end included, never lands on an empty sequence.
    const int64_t j = last_at_or_before(args.batch, row, [&](int64_t k) { return static_cast<int64_t>(cu[k]); });
    source = args.cu_seqlens[args.active_rows[j]] + row - cu[j];
  } else {
    const int64_t active = *args.n_active;
    if (row < active) {
      source = args.active_rows[row];
    } else {
      const int64_t other = row - active;
      const int64_t j = last_at_or_before(active, other, [&](int64_t k) { return cu[k] - k; });
      const int64_t from = args.active_rows[j];
      source = args.batch + args.cu_seqlens[from] - from + other - (cu[j] - j);
    }
  }
  if (source < 0 || source >= args.in.count) return;
  copy_row(args.out + row * args.in.bytes, args.in.data + source * args.in.stride, args.in.bytes, unit,
           threadIdx.x % 32);
}

const char* compact(const CompactArgs& args, void* stream) {
  survivors_kernel<<<1, kScanThreads, 0, as_stream(stream)>>>(args);
  if (args.in.count > 0 && args.in.bytes > 0 && args.batch > 0) {
    const int unit = unit_of(args.in.data, args.out, args.in.bytes, args.in.stride, 0);
    move_survivors_kernel<<<blocks_for(args.in.count, kWarps), kWarps * 32, 0, as_stream(stream)>>>(args, unit);
  }
  return launch_error();
}

// --- gather and scatter --------------------------------------------------------------------------------------------

__global__ void gather_kernel(GatherArgs args, int unit) {
  const int64_t row = row_of_warp();
  if (row >= args.index.count) return;
  const int64_t source = index_at(args.index, row);
  if (source < 0 || source >= args.in.count) return;
  copy_row(args.out + row * args.in.bytes, args.in.data + source * args.in.stride, args.in.bytes, unit,
           threadIdx.x % 32);
}

const char* gather(const GatherArgs& args, void* stream) {
  if (args.index.count == 0 || args.in.bytes == 0) return nullptr;
  const int unit = unit_of(args.in.data, args.out, args.in.bytes, args.in.stride, 0);
  gather_kernel<<<blocks_for(args.index.count, kWarps), kWarps * 32, 0, as_stream(stream)>>>(args, unit);
  return launch_error();
}

__global__ void scatter_kernel(ScatterArgs args, int unit) {
  const int64_t row = row_of_warp();
  if (row >= args.index.count) return;
  const int64_t target = index_at(args.index, row);
  if (target < 0 || target >= args.out_count) return;
  copy_row(args.out + target * args.out_stride, args.in.data + row * args.in.stride, args.in.bytes, unit,
           threadIdx.x % 32);
}

const char* scatter(const ScatterArgs& args, void* stream) {
  if (args.index.count == 0 || args.in.bytes == 0) return nullptr;
  const int unit = unit_of(args.in.data, args.out, args.in.bytes, args.in.stride, args.out_stride);
  scatter_kernel<<<blocks_for(args.index.count, kWarps), kWarps * 32, 0, as_stream(stream)>>>(args, unit);
  return launch_error();
}

// --- padded <-> lead -----------------------------------------------------------------------------------------------

__global__ void pack_lead_kernel(LeadArgs args, int unit) {
  const int64_t row = row_of_warp();
  const int32_t* cu = args.cu_seqlens;
  if (row >= args.total || row >= cu[args.batch]) return;
  int64_t b = row, position = 0;
  if (row >= args.batch) {
    const int64_t other = row - args.batch;
    b = last_at_or_before(args.batch, other, [&](int64_t k) { return cu[k] - k; });
    position = other - (cu[b] - b) + 1;
  }
  if (position >= args.max_seqlen) return;
  copy_row(args.out + row * args.row_bytes, args.in + (b * args.max_seqlen + position) * args.row_bytes,
           args.row_bytes, unit, threadIdx.x % 32);
}

const char* pack_lead(const LeadArgs& args, void* stream) {
  if (args.total == 0 || args.row_bytes == 0) return nullptr;
  const int unit = unit_of(args.in, args.out, args.row_bytes, 0, 0);
  pack_lead_kernel<<<blocks_for(args.total, kWarps), kWarps * 32, 0, as_stream(stream)>>>(args, unit);
  return launch_error();
}

__global__ void unpack_lead_kernel(LeadArgs args, int unit) {
  const int64_t cell = row_of_warp();
  if (cell >= args.batch * args.max_seqlen) return;
  const int64_t b = cell / args.max_seqlen, position = cell % args.max_seqlen;
  const int64_t before = args.cu_seqlens[b] - b, length = args.cu_seqlens[b + 1] - args.cu_seqlens[b];
  const int64_t source = position == 0 ? b : args.batch + before + position - 1;
  char* out = args.out + cell * args.row_bytes;
  if (position < length && source < args.total) {
    copy_row(out, args.in + source * args.row_bytes, args.row_bytes, unit, threadIdx.x % 32);
  } else {
    clear_row(out, args.row_bytes, unit, threadIdx.x % 32);
  }
}

const char* unpack_lead(const LeadArgs& args, void* stream) {
  const int64_t cells = args.batch * args.max_seqlen;
  if (cells == 0 || args.row_bytes == 0) return nullptr;
  const int unit = unit_of(args.in, args.out, args.row_bytes, 0, 0);
  unpack_lead_kernel<<<blocks_for(cells, kWarps), kWarps * 32, 0, as_stream(stream)>>>(args, unit);
  return launch_error();
}

// --- the host's two questions --------------------------------------------------------------------------------------

const char* read_int(const int32_t* value, int32_t* result, void* stream) {
  cudaError_t error = cudaMemcpyAsync(result, value, sizeof(int32_t), cudaMemcpyDeviceToHost, as_stream(stream));
  if (error == cudaSuccess) error = cudaStreamSynchronize(as_stream(stream));
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace cuda
}  // namespace consistentee

// Driver 0 means that there is none. Read by kernels/extension.py through ctypes, before any CUDA tensor exists.
extern "C" __attribute__((visibility("default"))) void consistentee_cuda_versions(int* driver, int* runtime) {
  if (cudaDriverGetVersion(driver) != cudaSuccess) *driver = 0;
  if (cudaRuntimeGetVersion(runtime) != cudaSuccess) *runtime = 0;
}
