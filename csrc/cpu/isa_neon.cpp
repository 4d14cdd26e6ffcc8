// Kernels for NEON, which every 64-bit ARM processor has.
#if defined(__aarch64__)
#define LIIF_SIMD_NEON
#include "cpu/make_table.h"

namespace liif_fast {

const Kernels& neon_kernels() {
  static const Kernels table{"neon", make_table<float>(), make_table<double>()};
  return table;
}

}  // namespace liif_fast
#endif
