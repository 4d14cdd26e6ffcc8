// The fused decode's kernels with bfloat16 operands on tensor cores.
#include "query_kernels.cuh"

namespace liif_fast {

LIIF_INSTANTIATE_QUERY(BFloat16Products)

}  // namespace liif_fast
