// The fused decode's kernels with bfloat16 operands on tensor cores.
#include "cuda/decode/instantiate.cuh"

namespace liif_fast {

LIIF_INSTANTIATE_QUERY(BFloat16Products)

}  // namespace liif_fast
