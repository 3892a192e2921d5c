// What a model's weights come to for an op that runs all of it: checked once and held here, because as arguments of
// every call a hundred tensors take 30 us. Named by a number, which its owner drops.
#pragma once
#include <cstdint>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <unordered_map>

#include "fail.h"

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

// fp32 of this shape, contiguous.
inline const char* data_of(const char* name, const Tensor& tensor, std::initializer_list<int64_t> shape) {
  check_dtype(name, tensor, ScalarType::Float);
  check_shape(name, tensor, shape);
  check_contiguous(name, tensor);
  return bytes_of(tensor);
}

}  // namespace consistentee
