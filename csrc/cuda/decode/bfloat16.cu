// The fused decode's kernels with bfloat16 operands on tensor cores.
#include "cuda/decode/backward.cuh"
#include "cuda/decode/forward.cuh"
#include "cuda/decode/weights.cuh"

LIIF_INSTANTIATE_DECODE(kBFloat16)
LIIF_INSTANTIATE_WEIGHTS(kBFloat16)
