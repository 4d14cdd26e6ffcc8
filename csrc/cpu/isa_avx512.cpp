// Kernels for AVX-512 (F, BW, VL, DQ).
#if defined(__x86_64__)
#include "cpu/target.h"
LIIF_BEGIN_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")
#define LIIF_SIMD_AVX512
#include "cpu/make_table.h"

namespace liif_fast {

const Kernels& avx512_kernels() {
  static const Kernels table{"avx512", make_table<float>(), make_table<double>()};
  return table;
}

}  // namespace liif_fast
LIIF_END_TARGET
#endif
