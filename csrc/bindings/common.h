// The extension's interface to PyTorch through the LibTorch stable ABI: schemas, memory-safety checks, allocation,
// dtype switch, stream. Messages for users are in liif_fast/ops/validation.py.
//
// This header has the dtypes, checks and allocations that all bindings share.
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

// The dtype of geometry, weights and results.
template <class T>
constexpr ScalarType kDtype = std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;

// f(T{}) with the dtype of geometry that belongs to a tensor's dtype.
template <class F>
auto with_geometry(const Tensor& tensor, const F& f) {
  return tensor.scalar_type() == ScalarType::Double ? f(double{}) : f(float{});
}

// Where a call's tensors must be: a GPU's index, or this.
constexpr int32_t kCpu = -1;

inline int32_t device_index(const Tensor& tensor) { return tensor.is_cuda() ? tensor.get_device_index() : kCpu; }

inline void check(const Tensor& tensor, const char* name, int32_t device, const Sizes& sizes) {
  STD_TORCH_CHECK(device != kCpu || tensor.is_cpu(), name, " must be a CPU tensor");
  STD_TORCH_CHECK(device == kCpu || device_index(tensor) == device, name, " must be on cuda:", device);
  STD_TORCH_CHECK(tensor.dim() == static_cast<int64_t>(sizes.size()), name, " must have ", sizes.size(), " dimensions");
  for (size_t i = 0; i < sizes.size(); ++i)
    STD_TORCH_CHECK(tensor.size(static_cast<int64_t>(i)) == sizes[i], name, " must have size ", sizes[i],
                    " in dimension ", i, ", not ", tensor.size(static_cast<int64_t>(i)));
}

inline void check_contiguous(const Tensor& tensor, const char* name, int32_t device, const Sizes& sizes) {
  check(tensor, name, device, sizes);
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous");
}

// The data of a contiguous tensor of T. It is never null, although an empty tensor's own pointer may be.
template <class T>
const T* checked(const Tensor& tensor, const char* name, int32_t device, const Sizes& sizes) {
  static const T nothing{};
  check_contiguous(tensor, name, device, sizes);
  STD_TORCH_CHECK(tensor.scalar_type() == kDtype<T>, name, " has the wrong dtype");
  const void* const values = tensor.const_data_ptr();
  return values ? static_cast<const T*>(values) : &nothing;
}

// Null where the tensor is absent.
template <class T>
const T* checked(const MaybeTensor& tensor, const char* name, int32_t device, const Sizes& sizes) {
  return tensor ? checked<T>(*tensor, name, device, sizes) : nullptr;
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
