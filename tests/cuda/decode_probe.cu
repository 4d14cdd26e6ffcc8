// The bfloat16 decode of 256 channels alone, for the tests that read its machine code. ROWS: of a tile.
#include "cuda/decode/backward.cuh"
#include "cuda/decode/forward.cuh"
#include "cuda/decode/weights.cuh"

namespace liif_fast {

using Probe = Tile<MmaPolicy::kBFloat16, 256, ROWS>;
template __global__ void decode_forward_kernel<Probe, false>(const __grid_constant__ DecodeTask,
                                                             const __grid_constant__ SavedActivations);
template __global__ void decode_forward_kernel<Probe, true>(const __grid_constant__ DecodeTask,
                                                            const __grid_constant__ SavedActivations);
template __global__ void decode_backward_kernel<Probe>(const __grid_constant__ DecodeTask,
                                                       const __grid_constant__ SavedActivations,
                                                       const __grid_constant__ BackwardArrays);

template __global__ void decode_weights_kernel<Probe>(const __grid_constant__ DecodeTask,
                                                      const __grid_constant__ SavedActivations,
                                                      const __grid_constant__ BackwardArrays,
                                                      const __grid_constant__ WeightParts);

}  // namespace liif_fast
