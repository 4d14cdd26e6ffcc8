// The fused decode's kernels with TF32 operands on tensor cores.
#include "cuda/decode/backward.cuh"
#include "cuda/decode/forward.cuh"

namespace liif_fast {

LIIF_INSTANTIATE_DECODE(MmaPolicy::kTf32)

}  // namespace liif_fast
