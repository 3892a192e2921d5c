// LayerNorm of a sum of rows on CUDA: one block a row, three passes that find the row in L1. Limited by bytes: two rows
// (three for embeddings) in, one out.
#include "device.cuh"

namespace consistentee {
namespace cuda {

constexpr int kThreads = 128;

template <class T, class Value>
__device__ void normalise_row(const NormArgs& args, int64_t n, Value value) {
  using A = wide_t<T>;
  __shared__ A shared[kThreads / 32];
  A sum = A(0);
  for (int64_t c = threadIdx.x; c < args.hidden; c += kThreads) sum += value(c);
  const A mean = block_sum(sum, shared) / static_cast<A>(args.hidden);
  A squares = A(0);
  for (int64_t c = threadIdx.x; c < args.hidden; c += kThreads) {
    const A centred = value(c) - mean;
    squares += centred * centred;
  }
  const A variance = block_sum(squares, shared) / static_cast<A>(args.hidden);
  const A rstd = static_cast<A>(1.0 / sqrt(static_cast<double>(variance) + args.eps));
  T* out = reinterpret_cast<T*>(args.out) + n * args.hidden;
  const T* weight = reinterpret_cast<const T*>(args.weight);
  const T* bias = reinterpret_cast<const T*>(args.bias);
  for (int64_t c = threadIdx.x; c < args.hidden; c += kThreads) {
    narrow(out + c, (value(c) - mean) * rstd * widen(weight[c]) + widen(bias[c]));
  }
}

template <class T>
__global__ void add_norm_kernel(NormArgs args) {
  const int64_t n = blockIdx.x;
  const T* x = reinterpret_cast<const T*>(args.x) + n * args.x_stride;
  const T* residual = reinterpret_cast<const T*>(args.residual) + n * args.residual_stride;
  normalise_row<T>(args, n, [&](int64_t c) { return widen(x[c]) + widen(residual[c]); });
}

template <class T>
__global__ void embed_norm_kernel(NormArgs args) {
  using A = wide_t<T>;
  const int64_t n = blockIdx.x;
  // Ids out of range (the CPU refuses them) read row 0 rather than foreign memory.
  const auto row = [&](const char* table, int64_t id, int64_t size) {
    return reinterpret_cast<const T*>(table) + (id >= 0 && id < size ? id : 0) * args.hidden;
  };
  const T* word = row(args.word, index_at(args.ids, n), args.n_word);
  const T* position = row(args.position, index_at(args.positions, n), args.n_position);
  const T* type = args.token_type == nullptr
                      ? nullptr
                      : row(args.token_type, args.types.data != nullptr ? index_at(args.types, n) : 0,
                            args.n_token_type);
  normalise_row<T>(args, n, [&](int64_t c) {
    return widen(word[c]) + (type != nullptr ? widen(type[c]) : A(0)) + widen(position[c]);
  });
}

const char* add_layer_norm(const NormArgs& args, void* stream) {
  if (args.count == 0 || args.hidden == 0) return nullptr;
  return with_dtype(args.dtype, [&](auto* null) {
    using T = std::remove_cv_t<std::remove_pointer_t<decltype(null)>>;
    add_norm_kernel<T><<<static_cast<unsigned>(args.count), kThreads, 0, as_stream(stream)>>>(args);
    return launch_error();
  });
}

const char* embed_layer_norm(const NormArgs& args, void* stream) {
  if (args.count == 0 || args.hidden == 0) return nullptr;
  return with_dtype(args.dtype, [&](auto* null) {
    using T = std::remove_cv_t<std::remove_pointer_t<decltype(null)>>;
    embed_norm_kernel<T><<<static_cast<unsigned>(args.count), kThreads, 0, as_stream(stream)>>>(args);
    return launch_error();
  });
}

}  // namespace cuda
}  // namespace consistentee
