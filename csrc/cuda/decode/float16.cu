// The fused decode's kernels with float16 operands on tensor cores.
#include "cuda/decode/backward.cuh"
#include "cuda/decode/forward.cuh"

LIIF_INSTANTIATE_DECODE(kFloat16)
