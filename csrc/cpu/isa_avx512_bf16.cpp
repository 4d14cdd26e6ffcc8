// bfloat16 operands with AVX-512-BF16: two products per lane and instruction.
#if defined(__x86_64__)
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
  using Op = Bf16Op;
  static const Bf16Kernels table{
      {packed_bytes<Op>, pack<Op>, layout_bytes<ForwardScratch<Op>, DecodeProblem<float>>, forward_tiles<Op, float>,
       layout_bytes<SavedTile<Op>, DecodeProblem<float>>, layout_bytes<BackwardScratch<Op>, DecodeProblem<float>>,
       backward_tiles<Op, float>, bf16_multiply_add_loop},
      forward_tiles<Op, Bf16>};
  return table;
}

}  // namespace liif_fast
LIIF_END_TARGET
#endif
