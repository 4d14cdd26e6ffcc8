// Kernels for AVX2 and FMA.
#if defined(__x86_64__)
#include "cpu/target.h"
LIIF_BEGIN_TARGET("avx2,fma")
#define LIIF_SIMD_AVX2
#include "cpu/make_table.h"

namespace liif_fast {

const Kernels& avx2_kernels() {
  static const Kernels table{"avx2", make_table<float>(), make_table<double>()};
  return table;
}

}  // namespace liif_fast
LIIF_END_TARGET
#endif
