// The checks of the CUDA bindings, and torch's current stream. They need no CUDA torch and no CUDA header.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include "bindings/common.h"
#include "cuda/launch.h"

namespace liif_fast {

using torch::stable::accelerator::DeviceGuard;

// torch's current stream of a device. Defined in bindings_cuda.cpp.
void* current_stream(int32_t device);

inline void check_launch(const char* error) {
  STD_TORCH_CHECK(!error, "a CUDA kernel could not be launched: ", error ? error : "", " (sm_80 or newer is needed)");
}

inline void check(const Tensor& tensor, const char* name, int32_t device, const Sizes& sizes) {
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == device, name, " must be on cuda:", device);
  check_sizes(tensor, name, sizes);
}

inline void check_contiguous(const Tensor& tensor, const char* name, int32_t device, const Sizes& sizes) {
  check(tensor, name, device, sizes);
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous");
}

// The data of a contiguous tensor of geometry's dtype. bindings_cpu.h has the CPU's function of this name.
template <class T>
const T* checked(const Tensor& tensor, const char* name, int32_t device, const Sizes& sizes) {
  check_contiguous(tensor, name, device, sizes);
  STD_TORCH_CHECK(tensor.scalar_type() == kDtype<T>, name, " has the wrong dtype");
  return static_cast<const T*>(tensor.const_data_ptr());
}

inline Dtype dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double:
      return Dtype::kFloat64;
    case ScalarType::Float:
      return Dtype::kFloat32;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Half:
      return Dtype::kFloat16;
    default:
      STD_TORCH_CHECK(false, name, " must be float64, float32, bfloat16 or float16");
  }
}

}  // namespace liif_fast
