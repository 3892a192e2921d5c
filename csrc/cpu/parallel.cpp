#include "parallel.h"

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdlib>
#include <new>

namespace consistentee {

int64_t num_threads() { return torch::stable::get_num_threads(); }

void run_tasks(int64_t count, bool parallel, TaskFn fn, void* context) {
  const int64_t threads = parallel ? num_threads() : 1;
  const int64_t workers = threads < count ? threads : count;
  if (workers <= 1) {
    for (int64_t task = 0; task < count; ++task) fn(context, task);
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < count;) fn(context, task);
  });
}

namespace {
struct Scratch {
  void* data = nullptr;
  size_t size = 0;
  ~Scratch() { std::free(data); }
};
}  // namespace

void* thread_scratch(int slot, size_t bytes) {
  static thread_local Scratch slots[3];
  Scratch& scratch = slots[slot];
  if (bytes > scratch.size) {
    const size_t rounded = (bytes + 4095) / 4096 * 4096;
    std::free(scratch.data);
    scratch.data = std::aligned_alloc(64, rounded);
    scratch.size = scratch.data != nullptr ? rounded : 0;
    if (scratch.data == nullptr) throw std::bad_alloc();
  }
  return scratch.data;
}

}  // namespace consistentee
