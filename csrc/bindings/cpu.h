// The checks of the CPU's bindings.
#pragma once

#include "bindings/common.h"

namespace liif_fast {

template <class T>
const T* checked(const Tensor& tensor, const char* name, const Sizes& sizes) {
  STD_TORCH_CHECK(tensor.is_cpu(), name, " must be a CPU tensor");
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous");
  STD_TORCH_CHECK(tensor.scalar_type() == kDtype<T>, name, " has the wrong dtype");
  check_sizes(tensor, name, sizes);
  return static_cast<const T*>(tensor.const_data_ptr());
}

// Null only where the tensor is absent: an empty tensor's own pointer may be null too.
template <class T>
const T* checked(const MaybeTensor& tensor, const char* name, const Sizes& sizes) {
  static const T nothing{};
  if (!tensor) return nullptr;
  const T* values = checked<T>(*tensor, name, sizes);
  return values ? values : &nothing;
}

}  // namespace liif_fast
