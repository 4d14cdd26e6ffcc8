// The fused decode's kernels with TF32 operands on tensor cores.
#include "query_kernels.cuh"

namespace liif_fast {

LIIF_INSTANTIATE_QUERY(Tf32Products)

}  // namespace liif_fast
