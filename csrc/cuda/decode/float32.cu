// The fused decode's kernels with float32 products on CUDA cores.
#include "cuda/decode/instantiate.cuh"

namespace liif_fast {

LIIF_INSTANTIATE_QUERY(FloatProducts)

}  // namespace liif_fast
