// The fused decode's kernels with TF32 operands on tensor cores.
#include "cuda/decode/backward.cuh"
#include "cuda/decode/forward.cuh"

LIIF_INSTANTIATE_DECODE(kTf32)
