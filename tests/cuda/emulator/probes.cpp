// Kernels with planted mistakes, and one without: `probes NAME` runs one. The tests expect each to be caught.
#include <cstdio>
#include <cstring>
#include <vector>

#include "cuda_runtime.h"

namespace {

// Every thread passes its number to its neighbor, through shared memory and through a shuffle.
__global__ void sound_kernel(int* out) {
  __shared__ int numbers[64];
  numbers[threadIdx.x] = static_cast<int>(threadIdx.x);
  __syncthreads();
  out[threadIdx.x] = numbers[threadIdx.x ^ 1] - __shfl_xor_sync(0xffffffffu, static_cast<int>(threadIdx.x), 1);
}

__global__ void shared_overflow_kernel(int* out) {
  __shared__ int numbers[64];
  numbers[threadIdx.x + 1] = 1;
  __syncthreads();
  out[threadIdx.x] = numbers[threadIdx.x];
}

__global__ void global_overflow_kernel(int* out) { out[threadIdx.x + 1] = 1; }

__global__ void divergent_block_kernel(int* out) {
  if (threadIdx.x < 40) __syncthreads();
  out[threadIdx.x] = 0;
}

__global__ void divergent_warp_kernel(int* out) {
  if (threadIdx.x % 32 < 5) return;
  out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1, 1);
}

__global__ void absent_lane_kernel(int* out) {
  if (threadIdx.x % 32 < 16) out[threadIdx.x] = __shfl_xor_sync(0xffffu, 1, 16);
}

}  // namespace

int main(int count, char** arguments) {
  const char* name = count == 2 ? arguments[1] : "";
  void (*kernel)(int*) = nullptr;
#define LIIF_PROBE(probe) \
  if (std::strcmp(name, #probe) == 0) kernel = probe##_kernel;
  LIIF_PROBE(sound)
  LIIF_PROBE(shared_overflow)
  LIIF_PROBE(global_overflow)
  LIIF_PROBE(divergent_block)
  LIIF_PROBE(divergent_warp)
  LIIF_PROBE(absent_lane)
#undef LIIF_PROBE
  if (!kernel) return 2;
  std::vector<int> out(64, -1);
  cudaLaunchConfig_t config = {};
  config.blockDim = dim3(64);
  try {
    cudaLaunchKernelEx(&config, kernel, out.data());
  } catch (const std::runtime_error& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 3;
  }
  for (const int value : out)
    if (value != 0) return 4;
  return 0;
}
