// Fills the table of the instruction set whose translation unit includes this.
#pragma once

#include "cpu/convolution_kernels.h"
#include "cpu/decode_backward.h"
#include "cpu/decode_forward.h"
#include "cpu/dispatch.h"
#include "cpu/metasr_kernels.h"

namespace liif_fast {
namespace {

// Multiply-adds on registers alone. The benchmarks time this loop for the peak rate of the arithmetic units.
template <class Op>
static double multiply_add_loop(int64_t repetitions) {
  using V = Vec<typename Op::Acc>;
  constexpr int kChains = kRows * kVecs;
  typename Op::Elem small;
  std::memset(&small, 0x3c, sizeof small);
  const auto a = Op::broadcast(&small), b = Op::broadcast(&small);
  typename V::Reg x[kChains];
#pragma GCC unroll 32  // all three loops: with an index known only at run time x would stay in memory
  for (int i = 0; i < kChains; ++i) x[i] = V::broadcast(static_cast<typename Op::Acc>(i));
  for (int64_t n = 0; n < repetitions; ++n) {
#pragma GCC unroll 32
    for (int i = 0; i < kChains; ++i) x[i] = Op::multiply_add(a, b, x[i]);
    asm volatile("" : : : "memory");  // keeps the compiler from folding repetitions
  }
  auto total = V::zero();
#pragma GCC unroll 32
  for (int i = 0; i < kChains; ++i) total = V::add(total, x[i]);
  volatile typename Op::Acc sink = V::sum(total);
  (void)sink;
  return 2.0 * kChains * Op::kPack * V::kLanes * static_cast<double>(repetitions);
}

template <class Op, class T = typename Op::Acc>
constexpr DecodeKernels<T> decode_kernels() {
  return {packed_bytes<Op>,
          pack<Op>,
          layout_bytes<ForwardScratch<Op>, DecodeProblem<T>>,
          forward_tiles<Op, T>,
          layout_bytes<SavedTile<Op>, DecodeProblem<T>>,
          layout_bytes<BackwardScratch<Op>, DecodeProblem<T>>,
          backward_tiles<Op, T>,
          multiply_add_loop<Op>};
}

template <class T>
constexpr MatrixKernels<T> make_table() {
  return {
      decode_kernels<FloatOp<T>>(),
      kTileRows,
      layout_bytes<Sums<T>, DecodeProblem<T>>,
      scatter_rows<T>,
      add_sums<T>,
      layout_bytes<MetasrScratch<T>, MetasrProblem<T>>,
      metasr_forward<T>,
      metasr_backward<T>,
      metasr_add_sums<T>,
      metasr_scatter<T>,
      layout_bytes<KernelGradsScratch<T>, ConvolutionGradsProblem<T>>,
      kernel_grads_rows<T>,
      add_kernel_grads<T>,
  };
}

}  // namespace
}  // namespace liif_fast
