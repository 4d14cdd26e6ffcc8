// What the bindings share: dtypes, size checks, allocation. Included by bindings*.cpp only.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

namespace liif_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;
using Sizes = std::vector<int64_t>;

// Of geometry, weights and results.
template <class T>
constexpr ScalarType kDtype = std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;

inline void check_sizes(const Tensor& tensor, const char* name, const Sizes& sizes) {
  STD_TORCH_CHECK(tensor.dim() == static_cast<int64_t>(sizes.size()), name, " must have ", sizes.size(), " dimensions");
  for (size_t i = 0; i < sizes.size(); ++i)
    STD_TORCH_CHECK(tensor.size(static_cast<int64_t>(i)) == sizes[i], name, " must have size ", sizes[i],
                    " in dimension ", i, ", not ", tensor.size(static_cast<int64_t>(i)));
}

template <class T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

template <class T>
Tensor empty(const Tensor& like, const Sizes& sizes) {
  return torch::stable::new_empty(like, sizes, kDtype<T>);
}

template <class T>
Tensor zeros(const Tensor& like, const Sizes& sizes) {
  return torch::stable::new_zeros(like, sizes, kDtype<T>);
}

}  // namespace liif_fast
