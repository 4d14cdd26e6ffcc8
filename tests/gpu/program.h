// What the programs of this folder share: errors end them, and memory is read by both sides.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "cuda/common.cuh"

namespace liif_fast {

inline void check(const char* error) {
  if (!error) return;
  std::fprintf(stderr, "%s\n", error);
  std::exit(1);
}
inline void check(cudaError_t error) { check(error == cudaSuccess ? nullptr : cudaGetErrorString(error)); }

// Zeros.
template <class E>
E* allocate(int64_t count) {
  void* found = nullptr;
#ifdef __CUDACC__
  check(cudaMallocManaged(&found, static_cast<size_t>(count) * sizeof(E)));
#else
  found = std::calloc(static_cast<size_t>(count), sizeof(E));
#endif
  std::memset(found, 0, static_cast<size_t>(count) * sizeof(E));
  return static_cast<E*>(found);
}
inline void finish() {
#ifdef __CUDACC__
  check(cudaDeviceSynchronize());
#endif
}

}  // namespace liif_fast
