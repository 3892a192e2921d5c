// What every CPU of the architecture has: SSE2 on x86-64, NEON on 64-bit Arm.
#include <cstdint>

#include "table.h"

#define EE_NAMESPACE baseline
#define EE_TABLE kBaselineKernels
#define EE_NAME "baseline"
#define EE_VECTOR_BYTES 16
#define EE_REGISTERS 16
#include "kernels.inc"
