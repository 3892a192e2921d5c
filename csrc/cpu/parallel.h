// Work sharing over torch's own thread pool.
#pragma once
#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace consistentee {

using TaskFn = void (*)(void* context, int64_t task);

// Runs fn(context, task) for every task below `count`. Threads take tasks one by one, so that sequences of unequal
// length and a neighbour on the core do not leave one thread with the rest. fn must not throw.
void run_tasks(int64_t count, bool parallel, TaskFn fn, void* context);
int64_t num_threads();

template <class F>
void for_each_task(int64_t count, bool parallel, F&& f) {
  using Fn = std::remove_reference_t<F>;
  run_tasks(
      count, parallel, [](void* context, int64_t task) { (*static_cast<Fn*>(context))(task); },
      const_cast<void*>(static_cast<const void*>(&f)));
}

// Scratch of the calling thread: 64-byte aligned, kept and grown from call to call, contents undefined. Three
// slots, because the thread that runs a pass (2) plans a call (1) and may also work on it (0).
void* thread_scratch(int slot, size_t bytes);

}  // namespace consistentee
