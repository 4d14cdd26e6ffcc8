// The fused decode's kernels with float32 products on CUDA cores.
#include "cuda/decode/backward.cuh"
#include "cuda/decode/forward.cuh"

namespace liif_fast {

LIIF_INSTANTIATE_DECODE(MmaPolicy::kFloat32)

}  // namespace liif_fast
