// Sums over rows (csrc/cuda/row_product.cuh) of two numpy arrays, for tests of that product alone.
#pragma once

#include "cuda/row_product.cuh"
#include "numpy_arrays.h"

namespace liif_fast {
namespace {

// out: [parts][kA][kB]. A block may have several parts.
template <class T>
__global__ void row_product_kernel(const typename T::Element* a, const typename T::Element* b, int64_t rows, int parts,
                                   float* out) {
  LIIF_DYNAMIC_SHARED(shared);
  RowProduct<T> product(*reinterpret_cast<ProductSpace<T>*>(shared));
  for (int part = static_cast<int>(blockIdx.x); part < parts; part += static_cast<int>(gridDim.x)) {
    const RowPart range(rows / T::kRows, part, parts);
    const int64_t first = range.first * T::kRows;
    ProductSums<T> sums;
    product.run(range.count, CopiedRows<T, T::kA>(a + first * T::kA, T::kA),
                CopiedRows<T, T::kB>(b + first * T::kB, T::kB), sums);
    RowProduct<T>::for_each(sums, [&](int i, int j, float2 two) {
      *reinterpret_cast<float2*>(out + (static_cast<int64_t>(part) * T::kA + i) * T::kB + j) = two;
    });
  }
}

// a, b: [rows, channels], the bits of bfloat16; rows is a multiple of 32. Returns [channels of a, channels of b].
template <int kA, int kB>
py::array row_product(const py::array& a, const py::array& b, int parts, unsigned blocks) {
  using T = ProductTile<__nv_bfloat16, kA, kB>;
  py::array by_part = make(py::dtype::of<float>(), {parts, kA, kB}, kNaN), out = make(by_part.dtype(), {kA, kB}, kNaN);
  const auto* const rows_a = static_cast<const __nv_bfloat16*>(a.data());
  const auto* const rows_b = static_cast<const __nv_bfloat16*>(b.data());
  check(launch(row_product_kernel<T>, LaunchSize{blocks, sizeof(ProductSpace<T>)}, nullptr, rows_a, rows_b,
               static_cast<int64_t>(a.shape(0)), parts, write<float>(by_part)));
  for (int64_t i = 0; i < T::kSums; i += 4)
    *reinterpret_cast<float4*>(write<float>(out) + i) = add_parts(write<float>(by_part) + i, parts, T::kSums);
  return out;
}

}  // namespace

void bind_products(py::module_& m) {
  m.def("row_product", [](const py::array& a, const py::array& b, int parts, unsigned blocks) {
    const auto run = a.shape(1) == 64    ? row_product<64, 64>
                     : b.shape(1) == 128 ? row_product<128, 128>
                                         : row_product<128, 256>;
    return run(a, b, parts, blocks);
  });
}

}  // namespace liif_fast
