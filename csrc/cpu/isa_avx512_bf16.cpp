// bfloat16 operands with AVX-512-BF16: two products a lane and instruction. The standard headers come first, so that
// nothing in them is compiled for this target.
#if defined(__x86_64__)
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "cpu/target.h"
LIIF_BEGIN_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma")
#define LIIF_SIMD_AVX512
#define LIIF_SIMD_AVX512_BF16
#include "cpu/decode_backward.h"
#include "cpu/decode_forward.h"
#include "cpu/dispatch.h"

namespace liif_fast {
namespace {

double bf16_multiply_add_loop(int64_t repetitions) {
  constexpr int kChains = kRows * kVecs;
  __m512 x[kChains];
#pragma GCC unroll 32  // all three loops: with an index known only at run time x would stay in memory
  for (int i = 0; i < kChains; ++i) x[i] = _mm512_set1_ps(static_cast<float>(i));
  const __m512bh a = (__m512bh)_mm512_set1_epi16(0x3c00), b = (__m512bh)_mm512_set1_epi16(0x3c00);
  for (int64_t n = 0; n < repetitions; ++n) {
#pragma GCC unroll 32
    for (int i = 0; i < kChains; ++i) x[i] = _mm512_dpbf16_ps(x[i], a, b);
    asm volatile("" : : : "memory");
  }
  __m512 total = _mm512_setzero_ps();
#pragma GCC unroll 32
  for (int i = 0; i < kChains; ++i) total = _mm512_add_ps(total, x[i]);
  volatile float sink = _mm512_reduce_add_ps(total);
  (void)sink;
  return 4.0 * kChains * 16 * static_cast<double>(repetitions);
}

}  // namespace

const Bf16Kernels& avx512_bf16_kernels() {
  static const Bf16Kernels table{packed_bytes<Bf16Op>,          pack<Bf16Op>,
                                 forward_scratch_bytes<Bf16Op>, forward_tiles<Bf16Op, float>,
                                 forward_tiles<Bf16Op, Bf16>,   backward_scratch_bytes<Bf16Op>,
                                 backward_tiles<Bf16Op, float>, bf16_multiply_add_loop};
  return table;
}

}  // namespace liif_fast
LIIF_END_TARGET
#endif
