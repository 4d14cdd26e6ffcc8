// The fused decode's kernels with float16 operands on tensor cores.
#include "cuda/decode/instantiate.cuh"

namespace liif_fast {

LIIF_INSTANTIATE_QUERY(HalfProducts)

}  // namespace liif_fast
