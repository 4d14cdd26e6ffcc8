// The Hopper decode's kernels alone, for the tests that read their machine code.
#include "cuda/decode/hopper.cuh"

namespace liif_fast {

template __global__ void decode_hopper_kernel<HopperTile<__nv_bfloat16, 4, 3, 3>>(const __grid_constant__ HopperTask);
template __global__ void decode_hopper_kernel<HopperTile<__half, 4, 4, 0, 128>>(const __grid_constant__ HopperTask);
template __global__ void decode_hopper_kernel<HopperTile<__nv_bfloat16, 1, 4, 0, 128>>(
    const __grid_constant__ HopperTask);
template __global__ void decode_hopper_kernel<HopperSavingTile<HopperTile<__nv_bfloat16, 4, 4, 0>>>(
    const __grid_constant__ HopperTask);
template __global__ void decode_hopper_kernel<HopperSavingTile<HopperTile<__half, 1, 4, 0>>>(
    const __grid_constant__ HopperTask);
template __global__ void decode_hopper_kernel<HopperSavingTile<HopperTile<__half, 4, 4, 0, 128>>>(
    const __grid_constant__ HopperTask);
template __global__ void decode_hopper_kernel<HopperSavingTile<HopperTile<__nv_bfloat16, 1, 4, 0, 128>>>(
    const __grid_constant__ HopperTask);
template __global__ void decode_hopper_backward_kernel<HopperSavingTile<HopperTile<__half, 4, 4, 0, 128>>>(
    const __grid_constant__ HopperTask, const __grid_constant__ BackwardArrays);
template __global__ void decode_hopper_backward_kernel<HopperSavingTile<HopperTile<__nv_bfloat16, 1, 4, 0, 128>>>(
    const __grid_constant__ HopperTask, const __grid_constant__ BackwardArrays);
template __global__ void decode_hopper_backward_kernel<HopperSavingTile<HopperTile<__nv_bfloat16, 4, 4, 0>>>(
    const __grid_constant__ HopperTask, const __grid_constant__ BackwardArrays);
template __global__ void decode_hopper_backward_kernel<HopperSavingTile<HopperTile<__half, 1, 4, 0>>>(
    const __grid_constant__ HopperTask, const __grid_constant__ BackwardArrays);

}  // namespace liif_fast
