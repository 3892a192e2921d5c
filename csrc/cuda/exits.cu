// exit_policy on CUDA: two launches, the pooler (one warp a dot product) and the policy (one block a row). Limited by
// latency at the few rows it sees; weights come from L2 after the first rows.
#include "device.cuh"

namespace consistentee {
namespace cuda {

constexpr int kWarps = 8;

template <class T>
__global__ void pooler_kernel(ExitPolicyArgs args) {
  using A = wide_t<T>;
  const int64_t unit = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (unit >= args.count * args.hidden) return;
  const int64_t n = unit / args.hidden, o = unit % args.hidden;
  const T* x = reinterpret_cast<const T*>(args.first) + n * args.hidden;
  const T* w = reinterpret_cast<const T*>(args.pooler_weight) + o * args.hidden;
  A sum = A(0);
  for (int64_t c = threadIdx.x % 32; c < args.hidden; c += 32) sum += widen(x[c]) * widen(w[c]);
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) {
    narrow(reinterpret_cast<T*>(args.state) + unit,
           tanh_of(sum + widen(reinterpret_cast<const T*>(args.pooler_bias)[o])));
  }
}

template <class T, class P>
__global__ void policy_kernel(ExitPolicyArgs args) {
  using A = wide_t<T>;
  __shared__ A shared[kWarps];
  const int64_t n = blockIdx.x;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const T* state = reinterpret_cast<const T*>(args.state) + n * args.hidden;
  const P* w1 = reinterpret_cast<const P*>(args.w1);
  A logit = A(0);
  for (int64_t p = warp; p < args.width; p += kWarps) {
    A sum = A(0);
    for (int64_t c = lane; c < args.hidden; c += 32) {
      sum += widen(state[c]) * static_cast<A>(widen(w1[p * args.hidden + c]));
    }
    sum = warp_sum(sum) + static_cast<A>(widen(reinterpret_cast<const P*>(args.b1)[p]));
    logit += gelu_of(sum) * static_cast<A>(widen(reinterpret_cast<const P*>(args.w2)[p]));
  }
  if (lane == 0) shared[warp] = logit;
  __syncthreads();
  if (threadIdx.x == 0) {
    A total = static_cast<A>(widen(*reinterpret_cast<const P*>(args.b2)));
    for (int w = 0; w < kWarps; ++w) total += shared[w];
    reinterpret_cast<A*>(args.logit)[n] = total;
  }
}

const char* exit_policy(const ExitPolicyArgs& args, void* stream) {
  if (args.count == 0) return nullptr;
  const cudaStream_t s = as_stream(stream);
  return with_dtype(args.dtype, [&](auto* null) -> const char* {
    using T = std::remove_cv_t<std::remove_pointer_t<decltype(null)>>;
    if (args.pooler_weight != nullptr) {
      pooler_kernel<T><<<blocks_for(args.count * args.hidden, kWarps), kWarps * 32, 0, s>>>(args);
    } else {
      const cudaError_t error = cudaMemcpyAsync(args.state, args.first, args.count * args.hidden * sizeof(T),
                                                cudaMemcpyDeviceToDevice, s);
      if (error != cudaSuccess) return cudaGetErrorString(error);
    }
    const unsigned blocks = static_cast<unsigned>(args.count);
    if (args.policy_dtype == args.dtype) {
      policy_kernel<T, T><<<blocks, kWarps * 32, 0, s>>>(args);
    } else {
      policy_kernel<T, float><<<blocks, kWarps * 32, 0, s>>>(args);
    }
    return launch_error();
  });
}

}  // namespace cuda
}  // namespace consistentee
