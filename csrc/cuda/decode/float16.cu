// The fused decode's kernels with float16 operands on tensor cores.
#include "cuda/decode/backward.cuh"
#include "cuda/decode/forward.cuh"
#include "cuda/decode/weights.cuh"

LIIF_INSTANTIATE_DECODE(kFloat16)
LIIF_INSTANTIATE_WEIGHTS(kFloat16)
