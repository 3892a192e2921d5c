// CPU backend of packed_linear: tasks over rows and panels; the arithmetic is in simd/linear.h.
#include "backends.h"
#include "fail.h"
#include "parallel.h"
#include "simd/table.h"

#include <atomic>

namespace consistentee {

// Bytes of x that one task works on: they stay in L2 beside two panels while the panels pass by.
static constexpr int64_t kRowBytes = 192 * 1024;
// Multiply-adds from which a parallel region pays for its few microseconds.
static constexpr int64_t kParallelMacs = 64 * 1024;
// What each thread fetches of the weight of the next product, while it works on its last panel. (A weight smaller than
// that is no harm: a prefetch past its end does not fault.)
static constexpr int64_t kNextBytes = 24 * 1024;

void Cpu::linear(const LinearArgs& args) const {
  if (args.count == 0 || args.outputs == 0) return;
  const KernelTable& table = kernels();
  const int64_t panels = (args.outputs + kPanel - 1) / kPanel;
  const bool parallel = args.count * args.inputs * args.outputs >= kParallelMacs;
  const int64_t threads = parallel ? num_threads() : 1;
  int64_t height = kRowBytes / (args.inputs * 4 + 1);
  height = height < 24 ? 24 : height;
  const int64_t bands = (args.count + height - 1) / height;
  height = (args.count + bands - 1) / bands;
  // Several tasks for each thread, of an even number of panels.
  const int64_t wanted = (threads * 6 + bands - 1) / bands;
  int64_t wide = panels / wanted;
  wide = wide < 2 ? (bands > threads || panels > 2 * threads ? 2 : 1) : wide / 2 * 2;
  const int64_t across = (panels + wide - 1) / wide;
  const int64_t tasks = bands * across;
  const int64_t panel_bytes = args.inputs * kPanel * 4;
  const char* weight = reinterpret_cast<const char*>(args.weight);

  // As run_tasks, but every thread takes its next task before it works on this one, to fetch that one's weight ahead.
  std::atomic<int64_t> next{0};
  const int64_t workers = threads < tasks ? threads : tasks;
  for_each_task(workers, parallel, [&](int64_t) {
    int64_t task = next.fetch_add(1, std::memory_order_relaxed);
    while (task < tasks) {
      const int64_t following = next.fetch_add(1, std::memory_order_relaxed);
      const int64_t n0 = task / across * height, p0 = task % across * wide;
      const int64_t n1 = n0 + height < args.count ? n0 + height : args.count;
      const int64_t p1 = p0 + wide < panels ? p0 + wide : panels;
      const char* coming = weight + following % across * wide * panel_bytes;
      int64_t coming_bytes = panel_bytes;
      if (following >= tasks) {  // the last but one of two threads takes the start, the last what is behind it
        coming = reinterpret_cast<const char*>(args.next) + (following - tasks) * kNextBytes;
        coming_bytes = args.next != nullptr ? kNextBytes : 0;
      }
      table.linear(args, n0, n1, p0, p1, coming, coming_bytes);
      task = following;
    }
  });
}

}  // namespace consistentee
