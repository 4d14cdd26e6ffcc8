// Vectors of one instruction set. Included by each csrc/cpu/isa_*.cpp after it has set the compiler's target and
// defined one of LIIF_SIMD_AVX512, LIIF_SIMD_AVX2, LIIF_SIMD_NEON, LIIF_SIMD_PORTABLE; everything stays inside that
// file's anonymous namespace, because the same inline function compiled for two targets must never be merged by the
// linker.
#pragma once

#if defined(LIIF_SIMD_AVX512) || defined(LIIF_SIMD_AVX2)
#include <immintrin.h>
#elif defined(LIIF_SIMD_NEON)
#include <arm_neon.h>
#endif

#include <cstdint>
#include <cstring>

#define LIIF_INLINE static inline __attribute__((always_inline))

namespace liif_fast {
namespace {

struct Bf16 {
  uint16_t bits;
};

// Vec<T>: Reg holds kLanes values of T. relu and keep_where_positive treat NaN as PyTorch does (NaN stays, NaN > 0 is
// false).
template <class T>
struct Vec;

#if defined(LIIF_SIMD_AVX512)

constexpr int kRows = 12, kVecs = 2;  // register tile: 24 of 32 registers accumulate, 2 hold B, 1 holds A

template <>
struct Vec<float> {
  using Reg = __m512;
  static constexpr int kLanes = 16;
  LIIF_INLINE Reg zero() { return _mm512_setzero_ps(); }
  LIIF_INLINE Reg broadcast(float x) { return _mm512_set1_ps(x); }
  LIIF_INLINE Reg load(const float* p) { return _mm512_loadu_ps(p); }
  LIIF_INLINE Reg load_partial(const float* p, int n) { return _mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p); }
  LIIF_INLINE Reg load(const Bf16* p) { return widen(_mm256_loadu_si256((const __m256i*)p)); }
  LIIF_INLINE Reg load_partial(const Bf16* p, int n) {
    return widen(_mm256_maskz_loadu_epi16((__mmask16)((1u << n) - 1), p));
  }
  LIIF_INLINE void store(float* p, Reg a) { _mm512_storeu_ps(p, a); }
  LIIF_INLINE Reg add(Reg a, Reg b) { return _mm512_add_ps(a, b); }
  LIIF_INLINE Reg mul(Reg a, Reg b) { return _mm512_mul_ps(a, b); }
  LIIF_INLINE Reg fma(Reg a, Reg b, Reg c) { return _mm512_fmadd_ps(a, b, c); }
  LIIF_INLINE Reg relu(Reg a) { return _mm512_max_ps(zero(), a); }
  LIIF_INLINE Reg keep_where_positive(Reg a, Reg sign) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(sign, zero(), _CMP_GT_OQ), a);
  }
  LIIF_INLINE float sum(Reg a) { return _mm512_reduce_add_ps(a); }
  LIIF_INLINE Reg widen(__m256i a) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(a), 16)); }
};

template <>
struct Vec<double> {
  using Reg = __m512d;
  static constexpr int kLanes = 8;
  LIIF_INLINE Reg zero() { return _mm512_setzero_pd(); }
  LIIF_INLINE Reg broadcast(double x) { return _mm512_set1_pd(x); }
  LIIF_INLINE Reg load(const double* p) { return _mm512_loadu_pd(p); }
  LIIF_INLINE Reg load_partial(const double* p, int n) { return _mm512_maskz_loadu_pd((__mmask8)((1u << n) - 1), p); }
  LIIF_INLINE void store(double* p, Reg a) { _mm512_storeu_pd(p, a); }
  LIIF_INLINE Reg add(Reg a, Reg b) { return _mm512_add_pd(a, b); }
  LIIF_INLINE Reg mul(Reg a, Reg b) { return _mm512_mul_pd(a, b); }
  LIIF_INLINE Reg fma(Reg a, Reg b, Reg c) { return _mm512_fmadd_pd(a, b, c); }
  LIIF_INLINE Reg relu(Reg a) { return _mm512_max_pd(zero(), a); }
  LIIF_INLINE Reg keep_where_positive(Reg a, Reg sign) {
    return _mm512_maskz_mov_pd(_mm512_cmp_pd_mask(sign, zero(), _CMP_GT_OQ), a);
  }
  LIIF_INLINE double sum(Reg a) { return _mm512_reduce_add_pd(a); }
};

#elif defined(LIIF_SIMD_AVX2)

constexpr int kRows = 6, kVecs = 2;  // 12 of 16 registers accumulate, 2 hold B, 1 holds A

template <>
struct Vec<float> {
  using Reg = __m256;
  static constexpr int kLanes = 8;
  LIIF_INLINE Reg zero() { return _mm256_setzero_ps(); }
  LIIF_INLINE Reg broadcast(float x) { return _mm256_set1_ps(x); }
  LIIF_INLINE Reg load(const float* p) { return _mm256_loadu_ps(p); }
  LIIF_INLINE Reg load_partial(const float* p, int n) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_maskload_ps(p, _mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane));
  }
  LIIF_INLINE void store(float* p, Reg a) { _mm256_storeu_ps(p, a); }
  LIIF_INLINE Reg add(Reg a, Reg b) { return _mm256_add_ps(a, b); }
  LIIF_INLINE Reg mul(Reg a, Reg b) { return _mm256_mul_ps(a, b); }
  LIIF_INLINE Reg fma(Reg a, Reg b, Reg c) { return _mm256_fmadd_ps(a, b, c); }
  LIIF_INLINE Reg relu(Reg a) { return _mm256_max_ps(zero(), a); }
  LIIF_INLINE Reg keep_where_positive(Reg a, Reg sign) {
    return _mm256_and_ps(a, _mm256_cmp_ps(sign, zero(), _CMP_GT_OQ));
  }
  LIIF_INLINE float sum(Reg a) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }
};

template <>
struct Vec<double> {
  using Reg = __m256d;
  static constexpr int kLanes = 4;
  LIIF_INLINE Reg zero() { return _mm256_setzero_pd(); }
  LIIF_INLINE Reg broadcast(double x) { return _mm256_set1_pd(x); }
  LIIF_INLINE Reg load(const double* p) { return _mm256_loadu_pd(p); }
  LIIF_INLINE Reg load_partial(const double* p, int n) {
    const __m256i lane = _mm256_setr_epi64x(0, 1, 2, 3);
    return _mm256_maskload_pd(p, _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), lane));
  }
  LIIF_INLINE void store(double* p, Reg a) { _mm256_storeu_pd(p, a); }
  LIIF_INLINE Reg add(Reg a, Reg b) { return _mm256_add_pd(a, b); }
  LIIF_INLINE Reg mul(Reg a, Reg b) { return _mm256_mul_pd(a, b); }
  LIIF_INLINE Reg fma(Reg a, Reg b, Reg c) { return _mm256_fmadd_pd(a, b, c); }
  LIIF_INLINE Reg relu(Reg a) { return _mm256_max_pd(zero(), a); }
  LIIF_INLINE Reg keep_where_positive(Reg a, Reg sign) {
    return _mm256_and_pd(a, _mm256_cmp_pd(sign, zero(), _CMP_GT_OQ));
  }
  LIIF_INLINE double sum(Reg a) {
    const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(a), _mm256_extractf128_pd(a, 1));
    return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
  }
};

#elif defined(LIIF_SIMD_NEON)

constexpr int kRows = 6, kVecs = 3;  // 18 of 32 registers accumulate: 4 pipes of 4 cycles need 16

template <>
struct Vec<float> {
  using Reg = float32x4_t;
  static constexpr int kLanes = 4;
  LIIF_INLINE Reg zero() { return vdupq_n_f32(0); }
  LIIF_INLINE Reg broadcast(float x) { return vdupq_n_f32(x); }
  LIIF_INLINE Reg load(const float* p) { return vld1q_f32(p); }
  LIIF_INLINE Reg load_partial(const float* p, int n) {
    float a[kLanes] = {};
    std::memcpy(a, p, static_cast<size_t>(n) * sizeof *p);
    return load(a);
  }
  LIIF_INLINE Reg load(const Bf16* p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(&p->bits), 16)); }
  LIIF_INLINE Reg load_partial(const Bf16* p, int n) {
    Bf16 a[kLanes] = {};
    std::memcpy(a, p, static_cast<size_t>(n) * sizeof *p);
    return load(a);
  }
  LIIF_INLINE void store(float* p, Reg a) { vst1q_f32(p, a); }
  LIIF_INLINE Reg add(Reg a, Reg b) { return vaddq_f32(a, b); }
  LIIF_INLINE Reg mul(Reg a, Reg b) { return vmulq_f32(a, b); }
  LIIF_INLINE Reg fma(Reg a, Reg b, Reg c) { return vfmaq_f32(c, a, b); }
  LIIF_INLINE Reg relu(Reg a) { return vmaxq_f32(zero(), a); }
  LIIF_INLINE Reg keep_where_positive(Reg a, Reg sign) {
    return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(a), vcgtzq_f32(sign)));
  }
  LIIF_INLINE float sum(Reg a) { return vaddvq_f32(a); }
};

template <>
struct Vec<double> {
  using Reg = float64x2_t;
  static constexpr int kLanes = 2;
  LIIF_INLINE Reg zero() { return vdupq_n_f64(0); }
  LIIF_INLINE Reg broadcast(double x) { return vdupq_n_f64(x); }
  LIIF_INLINE Reg load(const double* p) { return vld1q_f64(p); }
  LIIF_INLINE Reg load_partial(const double* p, int) { return vsetq_lane_f64(*p, zero(), 0); }  // 1 of 2
  LIIF_INLINE void store(double* p, Reg a) { vst1q_f64(p, a); }
  LIIF_INLINE Reg add(Reg a, Reg b) { return vaddq_f64(a, b); }
  LIIF_INLINE Reg mul(Reg a, Reg b) { return vmulq_f64(a, b); }
  LIIF_INLINE Reg fma(Reg a, Reg b, Reg c) { return vfmaq_f64(c, a, b); }
  LIIF_INLINE Reg relu(Reg a) { return vmaxq_f64(zero(), a); }
  LIIF_INLINE Reg keep_where_positive(Reg a, Reg sign) {
    return vreinterpretq_f64_u64(vandq_u64(vreinterpretq_u64_f64(a), vcgtzq_f64(sign)));
  }
  LIIF_INLINE double sum(Reg a) { return vaddvq_f64(a); }
};

#else  // portable: 16-byte vectors in GCC's and Clang's own notation (SSE2, NEON, or scalar code)

constexpr int kRows = 4, kVecs = 2;

template <class T>
struct Vec {
  typedef T Reg __attribute__((vector_size(16)));
  static constexpr int kLanes = 16 / sizeof(T);
  LIIF_INLINE Reg zero() { return Reg{}; }
  LIIF_INLINE Reg broadcast(T x) { return Reg{} + x; }
  LIIF_INLINE Reg load(const T* p) {
    Reg a;
    std::memcpy(&a, p, sizeof a);
    return a;
  }
  LIIF_INLINE Reg load_partial(const T* p, int n) {
    Reg a{};
    std::memcpy(&a, p, static_cast<size_t>(n) * sizeof(T));
    return a;
  }
  LIIF_INLINE void store(T* p, Reg a) { std::memcpy(p, &a, sizeof a); }
  LIIF_INLINE Reg add(Reg a, Reg b) { return a + b; }
  LIIF_INLINE Reg mul(Reg a, Reg b) { return a * b; }
  LIIF_INLINE Reg fma(Reg a, Reg b, Reg c) { return a * b + c; }
  LIIF_INLINE Reg relu(Reg a) { return a < zero() ? zero() : a; }
  LIIF_INLINE Reg keep_where_positive(Reg a, Reg sign) { return sign > zero() ? a : zero(); }
  LIIF_INLINE T sum(Reg a) {
    T total = a[0];
    for (int i = 1; i < kLanes; ++i) total += a[i];
    return total;
  }
};

#endif

// The operands of a matrix micro-kernel. Elem is one element of the reduction dimension (a pair for bfloat16).
template <class T>
struct FloatOp {
  using Elem = T;
  using Value = T;  // activations in memory
  using Acc = T;
  using Reg = typename Vec<T>::Reg;
  static constexpr int kPack = 1;  // values per Elem
  LIIF_INLINE Reg load(const Elem* p) { return Vec<T>::load(p); }
  LIIF_INLINE Reg broadcast(const Elem* p) { return Vec<T>::broadcast(*p); }
  LIIF_INLINE Reg multiply_add(Reg a, Reg b, Reg c) { return Vec<T>::fma(a, b, c); }
};

#if defined(LIIF_SIMD_AVX512_BF16) || defined(LIIF_SIMD_NEON_BF16)
#define LIIF_SIMD_BF16
#endif

#if defined(LIIF_SIMD_AVX512_BF16)

LIIF_INLINE uint16_t to_bf16(float x) {
  return (uint16_t)_mm_extract_epi16((__m128i)_mm_cvtneps_pbh(_mm_set_ss(x)), 0);
}

struct Bf16Op {
  using Elem = uint32_t;
  using Value = Bf16;
  using Acc = float;
  using Reg = __m512;
  static constexpr int kPack = 2;
  LIIF_INLINE __m512bh load(const Elem* p) { return (__m512bh)_mm512_loadu_si512(p); }
  LIIF_INLINE __m512bh broadcast(const Elem* p) { return (__m512bh)_mm512_set1_epi32((int)*p); }
  LIIF_INLINE Reg multiply_add(__m512bh a, __m512bh b, Reg c) { return _mm512_dpbf16_ps(c, a, b); }
};

LIIF_INLINE void store_bf16(Bf16* p, const __m512 (&a)[kVecs]) {
  static_assert(kVecs == 2, "one 64-byte store");
  _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh(a[1], a[0]));
}
LIIF_INLINE void store_bf16(Bf16* p, __m512 a) { _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(a)); }

LIIF_INLINE __m512i pair_values(__m256i low, __m256i high) {
  return _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
}

// Stores Elems that pair kCols values of one row with those of the next row; zeros for the next row if `high` is null.
LIIF_INLINE void store_pairs(uint32_t* p, const Bf16* low, const Bf16* high) {
  const __m512i a = _mm512_loadu_si512(low), b = high ? _mm512_loadu_si512(high) : _mm512_setzero_si512();
  _mm512_storeu_si512(p, pair_values(_mm512_castsi512_si256(a), _mm512_castsi512_si256(b)));
  _mm512_storeu_si512(p + 16, pair_values(_mm512_extracti64x4_epi64(a, 1), _mm512_extracti64x4_epi64(b, 1)));
}

#elif defined(LIIF_SIMD_NEON_BF16)

LIIF_INLINE uint16_t to_bf16(float x) { return vget_lane_u16(vreinterpret_u16_bf16(vcvt_bf16_f32(vdupq_n_f32(x))), 0); }

struct Bf16Op {
  using Elem = uint32_t;
  using Value = Bf16;
  using Acc = float;
  using Reg = float32x4_t;
  static constexpr int kPack = 2;
  LIIF_INLINE bfloat16x8_t load(const Elem* p) { return vreinterpretq_bf16_u32(vld1q_u32(p)); }
  LIIF_INLINE bfloat16x8_t broadcast(const Elem* p) { return vreinterpretq_bf16_u32(vdupq_n_u32(*p)); }
  LIIF_INLINE Reg multiply_add(bfloat16x8_t a, bfloat16x8_t b, Reg c) { return vbfdotq_f32(c, a, b); }
};

LIIF_INLINE void store_bf16(Bf16* p, float32x4_t a) { vst1_u16(&p->bits, vreinterpret_u16_bf16(vcvt_bf16_f32(a))); }
LIIF_INLINE void store_bf16(Bf16* p, const float32x4_t (&a)[kVecs]) {
  for (int v = 0; v < kVecs; ++v) store_bf16(p + 4 * v, a[v]);
}

LIIF_INLINE void store_pairs(uint32_t* p, const Bf16* low, const Bf16* high) {
  for (int i = 0; i < 4 * kVecs; i += 4) {
    const auto pairs = vzip_u16(vld1_u16(&low[i].bits), high ? vld1_u16(&high[i].bits) : vdup_n_u16(0));
    vst1q_u32(p + i, vreinterpretq_u32_u16(vcombine_u16(pairs.val[0], pairs.val[1])));
  }
}

#endif

}  // namespace
}  // namespace liif_fast
