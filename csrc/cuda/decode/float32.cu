// The fused decode's kernels with float32 products on CUDA cores.
#include "cuda/decode/backward.cuh"
#include "cuda/decode/forward.cuh"

LIIF_INSTANTIATE_DECODE(kFloat32)
