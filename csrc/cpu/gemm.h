// Matrix micro-kernels: C [m, n] = start + A [m, k] * B [k, n], a register tile of kRows x kVecs vectors at a time.
//
// A block of kRows rows of A stays in L1; B streams from L2 in panels of kCols columns. With AVX-512 a step needs 2
// loads of B for 24 multiply-adds, a fifth of L2's bandwidth. Included inside each instruction set's translation unit,
// after simd.h.
#pragma once

#include "cpu/simd.h"

namespace liif_fast {
namespace {

enum class Start { kZero, kBias, kAccumulate };  // initial value of the accumulators
enum class Finish { kPlain, kRelu, kMask };      // kMask: keep C where `mask` is positive (ReLU's backward)

template <class T>
constexpr int kCols = kVecs * Vec<T>::kLanes;

LIIF_INLINE int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

template <class Op, class Out>
struct Gemm {
  using Elem = typename Op::Elem;
  using Acc = typename Op::Acc;
  const Elem* a;     // row i, step k at a[i*a_stride + k], or a[k*a_stride + i] where A is given transposed
  int64_t a_stride;  // in Elem
  const Elem* b;     // panel p, step k at b[p*b_panel + k*b_stride], kCols Elem
  int64_t b_stride, b_panel;
  Out* c;
  int64_t c_stride;
  const Acc* bias;                 // [n], padded to whole panels
  const typename Op::Value* mask;  // c's layout
  int64_t m, panels, k;
};

template <class Acc>
LIIF_INLINE void store_columns(Acc* c, const typename Vec<Acc>::Reg (&acc)[kVecs]) {
#pragma GCC unroll 4
  for (int v = 0; v < kVecs; ++v) Vec<Acc>::store(c + v * Vec<Acc>::kLanes, acc[v]);
}

#if defined(LIIF_SIMD_BF16)
LIIF_INLINE void store_columns(Bf16* c, const Vec<float>::Reg (&acc)[kVecs]) { store_bf16(c, acc); }
#endif

template <class Op, int R, bool kTransposed, Start kStart, Finish kFinish, class Out>
static void multiply_block(const Gemm<Op, Out>& g, int64_t row, int64_t panel) {
  using Acc = typename Op::Acc;
  using V = Vec<Acc>;
  constexpr int kLanes = V::kLanes;
  typename V::Reg acc[R][kVecs];
  const int64_t column = panel * kVecs * kLanes;
  Out* const c = g.c + row * g.c_stride + column;
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      if constexpr (kStart == Start::kZero) acc[r][v] = V::zero();
      if constexpr (kStart == Start::kBias) acc[r][v] = V::load(g.bias + column + v * kLanes);
      if constexpr (kStart == Start::kAccumulate) acc[r][v] = V::load(c + r * g.c_stride + v * kLanes);
    }
  }
  const auto* a = g.a + (kTransposed ? row : row * g.a_stride);
  const auto* b = g.b + panel * g.b_panel;
  const int64_t a_stride = g.a_stride, b_stride = g.b_stride;
  for (int64_t step = 0; step < g.k; ++step) {
    decltype(Op::load(b)) bs[kVecs];
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) bs[v] = Op::load(b + v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const auto x = Op::broadcast(kTransposed ? a + r : a + r * a_stride);
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) acc[r][v] = Op::multiply_add(x, bs[v], acc[r][v]);
    }
    a += kTransposed ? a_stride : 1;
    b += b_stride;
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      if constexpr (kFinish == Finish::kRelu) acc[r][v] = V::relu(acc[r][v]);
      if constexpr (kFinish == Finish::kMask) {
        const auto* mask = g.mask + (row + r) * g.c_stride + column;
        acc[r][v] = V::keep_where_positive(acc[r][v], V::load(mask + v * kLanes));
      }
    }
    store_columns(c + r * g.c_stride, acc[r]);
  }
}

// The rows left over after the blocks of kRows: R counts down to them at compile time.
template <class Op, int R, bool kTransposed, Start kStart, Finish kFinish, class Out>
static void multiply_rest(const Gemm<Op, Out>& g, int64_t row) {
  if constexpr (R > 0) {
    if (g.m - row == R) {
      for (int64_t panel = 0; panel < g.panels; ++panel)
        multiply_block<Op, R, kTransposed, kStart, kFinish>(g, row, panel);
    } else {
      multiply_rest<Op, R - 1, kTransposed, kStart, kFinish>(g, row);
    }
  }
}

// A function of its own: as a part of a whole tile, GCC's loops for ARM keep a counter on the stack.
template <class Op, bool kTransposed, Start kStart, Finish kFinish, class Out>
__attribute__((noinline)) static void multiply(const Gemm<Op, Out>& g) {
  int64_t row = 0;
  for (; row + kRows <= g.m; row += kRows)
    for (int64_t panel = 0; panel < g.panels; ++panel)
      multiply_block<Op, kRows, kTransposed, kStart, kFinish>(g, row, panel);
  multiply_rest<Op, kRows - 1, kTransposed, kStart, kFinish>(g, row);
}

// Packs a [n, k] weight as B = weight^T: panels of kCols columns, zero padded. With `transposed` the weight is [k, n]
// and B = weight.
template <class T>
static void pack_panels(const T* weight, int64_t n, int64_t k, bool transposed, T* packed) {
  for (int64_t first = 0; first < n; first += kCols<T>)
    for (int64_t step = 0; step < k; ++step)
      for (int64_t column = first; column < first + kCols<T>; ++column) {
        const int64_t at = transposed ? step * n + column : column * k + step;
        *packed++ = column < n ? weight[at] : T(0);
      }
}

#if defined(LIIF_SIMD_BF16)
// The same for bfloat16: one Elem holds steps 2i and 2i + 1 of a column.
static void pack_panels(const float* weight, int64_t n, int64_t k, bool transposed, uint32_t* packed) {
  const auto value = [&](int64_t step, int64_t column) -> uint32_t {
    if (step >= k || column >= n) return 0;
    return to_bf16(weight[transposed ? step * n + column : column * k + step]);
  };
  for (int64_t first = 0; first < n; first += kCols<float>)
    for (int64_t step = 0; step < k; step += 2)
      for (int64_t column = first; column < first + kCols<float>; ++column)
        *packed++ = value(step, column) | value(step + 1, column) << 16;
}
#endif

// Rows [count, stride] as operands of a product that sums over the rows: an Elem holds kPack rows of a column, zeros
// after the last one. `packed` is a buffer for them, unused where the rows already have this layout.
template <class Op>
static const typename Op::Elem* pack_rows(const typename Op::Value* rows, int64_t stride, int64_t count, int64_t width,
                                          typename Op::Elem* packed) {
  if constexpr (Op::kPack == 1) {
    return rows;
  } else {
    for (int64_t row = 0; row < count; row += 2) {
      const auto* low = rows + row * stride;
      for (int64_t i = 0; i < width; i += kCols<typename Op::Acc>)
        store_pairs(packed + row / 2 * stride + i, low + i, row + 1 < count ? low + stride + i : nullptr);
    }
    return packed;
  }
}

}  // namespace
}  // namespace liif_fast
