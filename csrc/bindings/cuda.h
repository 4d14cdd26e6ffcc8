// Launches and torch's current stream, for the CUDA bindings. Neither a CUDA torch nor a CUDA header is needed.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include "bindings/problems.h"
#include "cuda/launch.h"

namespace liif_fast {

using torch::stable::accelerator::DeviceGuard;

// torch's current stream of a device. Defined in cuda_gather.cpp.
void* current_stream(int32_t device);

inline void check_launch(const char* error) {
  STD_TORCH_CHECK(!error, "a CUDA kernel could not be launched: ", error ? error : "", " (sm_80 or newer is needed)");
}

inline void check_on_gpu(const Tensor& tensor, const char* name, int64_t dimensions) {
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.dim() == dimensions, name, " must be a CUDA tensor of ", dimensions,
                  " dimensions");
}

inline Dtype to_dtype(const Tensor& tensor, const char* name) {
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
