// The fused decode's kernels with TF32 operands on tensor cores.
#include "cuda/decode/instantiate.cuh"

namespace liif_fast {

LIIF_INSTANTIATE_QUERY(Tf32Products)

}  // namespace liif_fast
