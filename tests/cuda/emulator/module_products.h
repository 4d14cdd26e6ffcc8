// Sums over rows (csrc/cuda/row_product.cuh) of two numpy arrays, for tests of that product alone.
#pragma once

#include "numpy_arrays.h"
#include "row_product_probe.h"

namespace liif_fast {
namespace {

// a: [rows, channels] of Value; b: the same in bfloat16; rows is a multiple of 32. Returns [channels of a, of b].
template <class Value, int kA, int kB>
py::array row_product(const py::array& a, const py::array& b, int parts, unsigned blocks) {
  using T = ProductTile<__nv_bfloat16, kA, kB>;
  py::array by_part = make(py::dtype::of<float>(), {parts, kA, kB}, kNaN), out = make(by_part.dtype(), {kA, kB}, kNaN);
  check(launch(row_product_kernel<T, Value>, LaunchSize{blocks, sizeof(ProductSpace<T>)}, nullptr,
               static_cast<const Value*>(a.data()), static_cast<const __nv_bfloat16*>(b.data()),
               static_cast<int64_t>(a.shape(0)), parts, write<float>(by_part)));
  for (int64_t i = 0; i < T::kSums; i += 4)
    *reinterpret_cast<float4*>(write<float>(out) + i) = add_parts(write<float>(by_part) + i, parts, T::kSums);
  return out;
}

}  // namespace

void bind_products(py::module_& m) {
  m.def("row_product", [](const py::array& a, const py::array& b, int parts, unsigned blocks) {
    const auto run = a.shape(1) == 64    ? row_product<__nv_bfloat16, 64, 64>
                     : b.shape(1) == 128 ? row_product<float, 128, 128>
                                         : row_product<__nv_bfloat16, 128, 256>;
    return run(a, b, parts, blocks);
  });
}

}  // namespace liif_fast
