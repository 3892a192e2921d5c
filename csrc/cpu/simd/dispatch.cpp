// Which instruction set this CPU has, asked once.
#include <cstring>

#include "table.h"

namespace consistentee {

static const KernelTable* const kTables[] = {
#if defined(__x86_64__)
    &kAvx512Kernels,
    &kAvx2Kernels,
#endif
    &kBaselineKernels,
};

static bool supported(const KernelTable& table) {
#if defined(__x86_64__)
  if (&table == &kAvx512Kernels) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
  if (&table == &kAvx2Kernels) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return &table == &kBaselineKernels;
}

static const KernelTable* widest() {
  for (const KernelTable* table : kTables) {
    if (supported(*table)) return table;
  }
  return &kBaselineKernels;
}

static const KernelTable* chosen = nullptr;

const KernelTable& kernels() {
  if (__builtin_expect(chosen == nullptr, 0)) chosen = widest();
  return *chosen;
}

}  // namespace consistentee

// For tests, which run every instruction set the machine has: null or an unknown name picks the widest. Returns the
// name now in use. Not to be called while an op runs.
extern "C" __attribute__((visibility("default"))) const char* consistentee_cpu_kernels(const char* name) {
  using namespace consistentee;
  chosen = widest();
  for (const KernelTable* table : kTables) {
    if (name != nullptr && std::strcmp(table->name, name) == 0 && supported(*table)) chosen = table;
  }
  return chosen->name;
}
