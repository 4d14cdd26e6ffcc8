// A kernel of sums over rows (csrc/cuda/row_product.cuh) alone, for module_products.h and ring.cpp.
#pragma once

#include "cuda/row_product.cuh"

namespace liif_fast {

// The first operand in float32, which is rounded on its way to shared memory.
template <class T>
class RoundedRows {
 public:
  RoundedRows(const float* rows, int64_t) : from_(rows + units_.row(0) * T::kA + units_.unit * 8) {}
  void begin(unsigned char*) {
    for (int i = 0; i < Units::kCount; ++i)
      for (int j = 0; j < 8; ++j) values_[i][j] = from_[i * Units::kStep * T::kA + j];
    from_ += T::kRows * T::kA;
  }
  void finish(unsigned char* half) {
    const auto two = [&](int i, int j) { return pack(values_[i][j], values_[i][j + 1], typename T::Element{}); };
    for (int i = 0; i < Units::kCount; ++i)
      *units_.place(half, i) = make_uint4(two(i, 0), two(i, 2), two(i, 4), two(i, 6));
  }

 private:
  using Units = StageUnits<T, T::kA>;
  Units units_;
  const float* from_;
  float values_[Units::kCount][8];
};

// a: in float32 or in the tile's dtype; out: [parts][kA][kB]. A block may have several parts.
template <class T, class Value>
__global__ void row_product_kernel(const Value* a, const typename T::Element* b, int64_t rows, int parts, float* out) {
  using A = std::conditional_t<std::is_same_v<Value, float>, RoundedRows<T>, CopiedRows<T, T::kA>>;
  LIIF_DYNAMIC_SHARED(shared);
  RowProduct<T> product(*reinterpret_cast<ProductSpace<T>*>(shared));
  for (int part = static_cast<int>(blockIdx.x); part < parts; part += static_cast<int>(gridDim.x)) {
    const RowPart range(rows / T::kRows, part, parts);
    const int64_t first = range.first * T::kRows;
    ProductSums<T> sums;
    product.run(range.count, A(a + first * T::kA, T::kA), CopiedRows<T, T::kB>(b + first * T::kB, T::kB), sums);
    RowProduct<T>::for_each(sums, [&](int i, int j, float2 two) {
      *reinterpret_cast<float2*>(out + (static_cast<int64_t>(part) * T::kA + i) * T::kB + j) = two;
    });
  }
}

}  // namespace liif_fast
