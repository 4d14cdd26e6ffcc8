// Kernels with planted mistakes, and one without: `probes NAME` runs one. The tests expect each to be caught.
#include <cstdio>
#include <cstring>
#include <vector>

#include "wgmma_on_cpu.h"

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

// A product with weights of 1 that ordinary stores have written: 16 if asynchronous instructions see them.
void multiply_stored(int* out, bool fences) {
  const auto weights = reinterpret_cast<uint16_t*>(cuda_on_cpu::dynamic_shared);
  for (unsigned i = threadIdx.x; i < 8192; i += 128) weights[i] = 0x3f80;
  if (fences) liif_fast::fence_async_proxy(16384);
  __syncthreads();
  float sums[64];
  const uint32_t ones[4] = {0x3f803f80, 0x3f803f80, 0x3f803f80, 0x3f803f80};
  liif_fast::fence_operands();
  liif_fast::multiply_add<0, false>(sums, ones, __nv_bfloat16{});
  liif_fast::commit_products();
  liif_fast::wait_products<0>();
  if (threadIdx.x < 64) out[threadIdx.x] = sums[0] == 16.0f ? 0 : 1;
}
__global__ void fenced_product_kernel(int* out) { multiply_stored(out, true); }
__global__ void unfenced_product_kernel(int* out) { multiply_stored(out, false); }

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
  LIIF_PROBE(fenced_product)
  LIIF_PROBE(unfenced_product)
#undef LIIF_PROBE
  if (!kernel) return 2;
  std::vector<int> out(64, -1);
  cudaLaunchConfig_t config = {};
  config.blockDim = dim3(std::strstr(name, "product") ? 128 : 64);
  config.dynamicSmemBytes = 16384;
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
