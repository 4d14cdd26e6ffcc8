// The fused decode's kernels with float16 operands on tensor cores.
#include "cuda/decode/backward.cuh"
#include "cuda/decode/forward.cuh"

namespace liif_fast {

LIIF_INSTANTIATE_DECODE(MmaPolicy::kFloat16)

}  // namespace liif_fast
