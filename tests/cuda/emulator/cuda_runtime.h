// Replaces CUDA's header of this name when a .cu is compiled for the CPU: the keywords, the functions of a thread, and
// the launch. It has only the names that csrc/cuda uses; others do not compile.
#pragma once

#include <cstdint>
#include <tuple>

#include "simt.h"

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

template <class T>
T __ldg(const T* address) {
  return *address;
}

inline void __syncthreads() { cuda_on_cpu::block.wait_block(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { cuda_on_cpu::block.wait_warp(mask, "__syncwarp"); }

// Counts its calls: the order of events, not their time.
inline long long clock64() {
  static long long calls = 0;
  return ++calls;
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  const unsigned lane = cuda_on_cpu::block.thread() % cuda_on_cpu::kWarpSize;
  return cuda_on_cpu::block.exchange(mask, value, lane ^ static_cast<unsigned>(lanes), "__shfl_xor_sync");
}

template <class T>
T atomicAdd(T* address, T value) {
  const T old = *address;
  *address = old + value;
  return old;
}

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess
             ? "no error"
             : (error == cudaErrorInvalidValue ? "invalid argument" : "invalid configuration argument");
}

enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor,
  cudaDevAttrReservedSharedMemoryPerBlock,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor
};
inline cudaError_t cudaGetDevice(int* device) {
  *device = cuda_on_cpu::current_device;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int number) {
  const cuda_on_cpu::Device& device = cuda_on_cpu::devices[static_cast<size_t>(number)];
  const int values[] = {device.processors, device.block_shared_bytes, device.processor_shared_bytes, 1024, device.major,
                        device.minor};
  *value = values[attribute];
  return cudaSuccess;
}

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int bytes) {
  const auto device = static_cast<size_t>(cuda_on_cpu::current_device);
  return bytes <= cuda_on_cpu::devices[device].block_shared_bytes ? cudaSuccess : cudaErrorInvalidValue;
}

enum cudaLaunchAttributeID { cudaLaunchAttributeNone, cudaLaunchAttributeClusterDimension };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    dim3 clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  const cudaLaunchAttribute* attrs;
  unsigned numAttrs;

  unsigned cluster() const { return numAttrs ? attrs->val.clusterDim.x : 1; }
};

// Of kernels that fill a processor with one block.
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, Kernel*, const cudaLaunchConfig_t* config) {
  const auto device = static_cast<size_t>(cuda_on_cpu::current_device);
  *clusters = cuda_on_cpu::devices[device].processors / static_cast<int>(config->cluster());
  return cudaSuccess;
}

// Throws std::runtime_error where not all threads reach a barrier.
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const dim3 grid = config->gridDim, threads = config->blockDim;
  const uint64_t size = uint64_t{threads.x} * threads.y * threads.z;
  if (grid.x == 0 || grid.x > 0x7fffffffu || grid.y - 1 >= 65535 || grid.z - 1 >= 65535 || size == 0 || size > 1024)
    return cudaErrorInvalidConfiguration;
  const std::tuple<Parameters...> copies(arguments...);
  if (grid.x % config->cluster() != 0) return cudaErrorInvalidConfiguration;
  cuda_on_cpu::run_grid(grid, threads, config->cluster(), config->dynamicSmemBytes,
                        [&] { std::apply(kernel, copies); });
  return cudaSuccess;
}
