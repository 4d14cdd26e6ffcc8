// bfloat16 operands with FEAT_BF16 of ARM: bfdot has two products per lane, as AVX-512-BF16 has.
#if defined(__aarch64__)
#include "cpu/target.h"
LIIF_BEGIN_TARGET("arch=armv8.2-a+bf16")
#define LIIF_SIMD_NEON
#define LIIF_SIMD_NEON_BF16
#include "cpu/make_table.h"

namespace liif_fast {

const Bf16Kernels& neon_bf16_kernels() {
  static const Bf16Kernels table{decode_kernels<Bf16Op>(), forward_tiles<Bf16Op, Bf16>};
  return table;
}

}  // namespace liif_fast
LIIF_END_TARGET
#endif
