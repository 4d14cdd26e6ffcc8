// Instructions that C++ cannot express: matrix products, asynchronous copies, packed conversions, vector reductions.
// ptx_on_cpu.h of tests/cuda/emulator has the same functions for the CPU.
#pragma once

#ifndef __CUDACC__
#include "ptx_on_cpu.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

// A block's dynamic shared memory.
#define LIIF_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]

namespace liif_fast {

// acc[m][n] += a[m] * b[n] for a warp's m16 and n8 tiles; one k16 step of 16-bit operands. A lane's fragments are those
// of the PTX manual: a row-major, b column-major.
template <int kRowTiles, int kColTiles>
__device__ __forceinline__ void mma_step(float (&acc)[kRowTiles][kColTiles][4], const uint4 (&a)[kRowTiles],
                                         const uint2 (&b)[kColTiles], __half) {
#pragma unroll
  for (int n = 0; n < kColTiles; ++n)
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
      asm volatile(
          "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
          : "+f"(acc[m][n][0]), "+f"(acc[m][n][1]), "+f"(acc[m][n][2]), "+f"(acc[m][n][3])
          : "r"(a[m].x), "r"(a[m].y), "r"(a[m].z), "r"(a[m].w), "r"(b[n].x), "r"(b[n].y));
}
template <int kRowTiles, int kColTiles>
__device__ __forceinline__ void mma_step(float (&acc)[kRowTiles][kColTiles][4], const uint4 (&a)[kRowTiles],
                                         const uint2 (&b)[kColTiles], __nv_bfloat16) {
#pragma unroll
  for (int n = 0; n < kColTiles; ++n)
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
      asm volatile(
          "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
          : "+f"(acc[m][n][0]), "+f"(acc[m][n][1]), "+f"(acc[m][n][2]), "+f"(acc[m][n][3])
          : "r"(a[m].x), "r"(a[m].y), "r"(a[m].z), "r"(a[m].w), "r"(b[n].x), "r"(b[n].y));
}
// One k8 step of TF32 operands in float's bits.
template <int kRowTiles, int kColTiles>
__device__ __forceinline__ void mma_step(float (&acc)[kRowTiles][kColTiles][4], const uint4 (&a)[kRowTiles],
                                         const uint2 (&b)[kColTiles], float) {
#pragma unroll
  for (int n = 0; n < kColTiles; ++n)
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
      asm volatile(
          "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
          : "+f"(acc[m][n][0]), "+f"(acc[m][n][1]), "+f"(acc[m][n][2]), "+f"(acc[m][n][3])
          : "r"(a[m].x), "r"(a[m].y), "r"(a[m].z), "r"(a[m].w), "r"(b[n].x), "r"(b[n].y));
}

// The thread's index in its block. It is read where this stands, so that nothing made of it stays in registers.
__device__ __forceinline__ int read_thread() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

// 16 bytes that the running kernel does not read again.
__device__ __forceinline__ void store_once(uint4* to, uint4 words) { __stcs(to, words); }

// 16 bytes that no kernel writes, in the order of the calls: the compiler moves no load to its first use.
__device__ __forceinline__ uint4 load_in_order(const uint4* from) {
  uint4 words;
  asm volatile("ld.global.nc.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
               : "l"(from));
  return words;
}

__device__ __forceinline__ uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// Four 8x8 matrices of 16-bit values in shared memory: lane l gives the place of row l % 8 of matrix l / 8, and gets
// two values of each matrix in a word, columns l % 4 * 2 and the next one of row l / 4. They are mma_step's `a`.
__device__ __forceinline__ uint4 load_matrices(const void* row) {
  uint4 words;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
               : "r"(shared_address(row))
               : "memory");
  return words;
}
// Four 8x8 matrices of 16-bit values in shared memory, transposed: lane l gives the place of row l % 8 of matrix l / 8,
// and gets two values of each matrix in a word, those of column l / 4 in rows l % 4 * 2 and the next one.
__device__ __forceinline__ uint4 load_transposed(const uint4* row) {
  uint4 words;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
               : "r"(shared_address(row))
               : "memory");
  return words;
}

// 16 bytes from global to shared memory, past L1 and the registers; both 16-byte aligned.
__device__ __forceinline__ void copy_async(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)), "l"(global) : "memory");
}
// Waits for this thread's copies.
__device__ __forceinline__ void wait_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// A barrier in shared memory (mbarrier): after `arrivals` arrivals a phase is complete, and the next one begins.
__device__ __forceinline__ void init_barrier(uint64_t* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void arrive(uint64_t* barrier) {
  asm volatile("{.reg .b64 state; mbarrier.arrive.shared.b64 state, [%0];}" ::"r"(shared_address(barrier)) : "memory");
}
// Arrives when all earlier copies of this thread have been made.
__device__ __forceinline__ void arrive_after_copies(uint64_t* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// Waits until the latest phase of this parity is complete. The first phase has parity 0; the one before it is complete.
__device__ __forceinline__ void wait_barrier(uint64_t* barrier, uint32_t parity) {
  uint32_t complete;
  do {
#if __CUDA_ARCH__ >= 900
    asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                 : "=r"(complete)
                 : "r"(shared_address(barrier)), "r"(parity)
                 : "memory");
#else
    asm volatile("{.reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                 : "=r"(complete)
                 : "r"(shared_address(barrier)), "r"(parity)
                 : "memory");
#endif
  } while (!complete);
}

// A barrier of some of the block's warps, `kCount` threads. Number 0 is __syncthreads's.
template <int kCount>
__device__ __forceinline__ void sync_threads(int number) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "n"(kCount) : "memory");
}

// ReLU that keeps NaN.
__device__ __forceinline__ float relu(float value) {
  float result;
  asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(result) : "f"(value));
  return result;
}

// Two values in one word, the first in the low half; rounded to nearest even.
__device__ __forceinline__ uint32_t pack(float low, float high, __half) {
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
__device__ __forceinline__ uint32_t pack(float low, float high, __nv_bfloat16) {
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
__device__ __forceinline__ uint32_t round_to_tf32(float value) {
  uint32_t word;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(word) : "f"(value));
  return word;
}

__device__ __forceinline__ uint32_t float_bits(float value) { return __float_as_uint(value); }
__device__ __forceinline__ float bits_float(uint32_t word) { return __uint_as_float(word); }
__device__ __forceinline__ float2 unpack(uint32_t word, __half) {
  return __half22float2(*reinterpret_cast<const __half2*>(&word));
}
__device__ __forceinline__ float2 unpack(uint32_t word, __nv_bfloat16) {
  return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u));
}

// Adds four values at a 16-byte aligned address of global memory. No thread waits for the sums.
__device__ __forceinline__ void reduce_add(float* address, float4 value) {
#if __CUDA_ARCH__ >= 900
  asm volatile("red.global.add.v4.f32 [%0], {%1,%2,%3,%4};" ::"l"(address), "f"(value.x), "f"(value.y), "f"(value.z),
               "f"(value.w)
               : "memory");
#else
  atomicAdd(address, value.x);
  atomicAdd(address + 1, value.y);
  atomicAdd(address + 2, value.z);
  atomicAdd(address + 3, value.w);
#endif
}

}  // namespace liif_fast
#endif
