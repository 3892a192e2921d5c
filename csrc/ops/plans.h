// What a model's weights come to for an op that runs all of it: checked once and held here, because as arguments of
// every call a hundred tensors take 30 us. Named by a number, which its owner drops.
#pragma once
#include <cstdint>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <type_traits>
#include <unordered_map>
#include <vector>

#include "fail.h"
#include "tensor.h"

namespace consistentee {

template <class Plan>
class Plans {
 public:
  int64_t put(std::shared_ptr<const Plan> plan) {
    const std::unique_lock lock(mutex_);
    plans_.emplace(next_, std::move(plan));
    return next_++;
  }
  // Whoever runs keeps what this returns until it is done.
  std::shared_ptr<const Plan> get(int64_t handle, const char* maker) const {
    const std::shared_lock lock(mutex_);
    const auto found = plans_.find(handle);
    EE_CHECK(found != plans_.end(), "plan must be one that ", maker, " made and nobody dropped, got ", handle);
    return found->second;
  }
  void drop(int64_t handle) {
    const std::unique_lock lock(mutex_);
    plans_.erase(handle);
  }

 private:
  mutable std::shared_mutex mutex_;
  std::unordered_map<int64_t, std::shared_ptr<const Plan>> plans_;
  int64_t next_ = 1;
};

template <class T>
constexpr ScalarType kTypeOf = ScalarType::Float;
template <>
inline constexpr ScalarType kTypeOf<int32_t> = ScalarType::Int;
template <>
inline constexpr ScalarType kTypeOf<int64_t> = ScalarType::Long;

// The elements of a contiguous tensor of this type and shape; T const where they are only read.
template <class T>
T* elements(const char* name, const Tensor& tensor, std::initializer_list<int64_t> shape) {
  check_dtype(name, tensor, kTypeOf<std::remove_const_t<T>>);
  check_shape(name, tensor, shape);
  check_contiguous(name, tensor);
  if constexpr (std::is_const_v<T>) {
    return reinterpret_cast<T*>(bytes_of(tensor));
  } else {
    return reinterpret_cast<T*>(out_bytes(tensor));
  }
}

// fp32, as the kernels take it.
inline const char* data_of(const char* name, const Tensor& tensor, std::initializer_list<int64_t> shape) {
  return reinterpret_cast<const char*>(elements<const float>(name, tensor, shape));
}

// w1, b1, w2, b2 of one exit.
inline void read_policy(ExitPolicyArgs& policy, const Tensor* t, int64_t hidden) {
  policy.hidden = hidden;
  check_dim("w1", t[0], 2);
  policy.width = t[0].size(0);
  policy.w1 = data_of("w1", t[0], {policy.width, hidden});
  policy.b1 = data_of("b1", t[1], {policy.width});
  policy.w2 = data_of("w2", t[2], {1, policy.width});
  policy.b2 = data_of("b2", t[3], {1});
}

// Numbers the exits of layers, each of which has a member `exit`: they rise, and the last one ends the model.
template <class Layer>
void place_exits(std::vector<Layer>& layers, const std::vector<int64_t>& exit_layers) {
  const int64_t count = static_cast<int64_t>(layers.size());
  int64_t before = 0;
  for (size_t e = 0; e < exit_layers.size(); ++e) {
    const int64_t layer = exit_layers[e];
    EE_CHECK(layer > before && layer <= count, "exit_layers must rise from at least 1 to ", count, ", got ", layer,
             " behind ", before);
    before = layer;
    layers[static_cast<size_t>(layer - 1)].exit = static_cast<int64_t>(e);
  }
  EE_CHECK(before == count, "exit_layers must end with the last layer, ", count, ", got ", before);
}

}  // namespace consistentee
