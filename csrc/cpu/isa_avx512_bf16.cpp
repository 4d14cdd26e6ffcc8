// bfloat16 operands with AVX-512-BF16: two products per lane and instruction.
#if defined(__x86_64__)
#include "cpu/target.h"
LIIF_BEGIN_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma")
#define LIIF_SIMD_AVX512
#define LIIF_SIMD_AVX512_BF16
#include "cpu/make_table.h"

namespace liif_fast {

const Bf16Kernels& avx512_bf16_kernels() {
  static const Bf16Kernels table{decode_kernels<Bf16Op>(), forward_tiles<Bf16Op, Bf16>};
  return table;
}

}  // namespace liif_fast
LIIF_END_TARGET
#endif
