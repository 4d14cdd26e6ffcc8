// Instructions of compute capability 9.0: products of a warpgroup (wgmma), bulk copies to both blocks of a cluster,
// registers that warps hand on. wgmma_on_cpu.h of tests/cuda/emulator has the same functions for the CPU.
#pragma once

#include "cuda/ptx.cuh"

#ifndef __CUDACC__
#include "wgmma_on_cpu.h"
#else

namespace liif_fast {

// Where dynamic shared memory begins on a device of compute capability 9.0, if a kernel has no other; the launch
// checks.
constexpr uint32_t kSharedBase = 0x400;

// threadIdx.x and gridDim.x, read again at every call: the compiler keeps what it computes from the variables, and
// spills.
__device__ __forceinline__ int reread_thread() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  __builtin_assume(thread >= 0);  // quotients are shifts
  return thread;
}
__device__ __forceinline__ int reread_grid() {
  int blocks;
  asm volatile("mov.u32 %0, %%nctaid.x;" : "=r"(blocks));
  return blocks;
}

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ __forceinline__ uint32_t cluster_size() {
  uint32_t size;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}
__device__ __forceinline__ void sync_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// After init_barrier, before another block or a copy uses the barriers.
__device__ __forceinline__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
// The address of a place in this block's shared memory as it is in block `rank` of the cluster.
__device__ __forceinline__ uint32_t remote_address(const void* shared, uint32_t rank) {
  uint32_t remote;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(shared_address(shared)), "r"(rank));
  return remote;
}
// Arrives at the barrier `kOffset` bytes after a remote address.
template <int kOffset>
__device__ __forceinline__ void arrive_remote(uint32_t remote) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0+%1];" ::"r"(remote), "n"(kOffset) : "memory");
}
// Arrives, and the phase is not complete before so many bytes more have been copied.
__device__ __forceinline__ void arrive_and_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
// From global memory to the same place in every block of the cluster whose bit is set in `ranks`, where it counts its
// bytes at the same barrier.
__device__ __forceinline__ void copy_bulk(void* shared, const void* global, uint32_t bytes, uint64_t* barrier,
                                          uint32_t ranks) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], "
      "%4;" ::"r"(shared_address(shared)),
      "l"(global), "r"(bytes), "r"(shared_address(barrier)), "h"(static_cast<uint16_t>(ranks))
      : "memory");
}

// The registers of each of the warp's threads, fewer or more than before. Warps wait for registers given back.
template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Before the first product that reads registers which other instructions have written.
__device__ __forceinline__ void fence_operands() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// Makes a group of the products since the last one.
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most kPending groups are under way.
template <int kPending>
__device__ __forceinline__ void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// d [64, 128] = a [64, 16] b [16, 128], plus d if kAdds, asynchronously. b lies kOffset bytes into dynamic shared
// memory, 128 rows of inputs with the 128-byte swizzle, eight rows after 1024 bytes. The descriptor is a constant: with
// addresses computed at run time ptxas keeps 32 descriptors in registers, and spills.
#define LIIF_EIGHT(d, i)                                                                                      \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define LIIF_MULTIPLY_ADD(Element, types)                                                                       \
  template <uint32_t kOffset, bool kAdds>                                                                       \
  __device__ __forceinline__ void multiply_add(float (&d)[64], const uint32_t (&a)[4], Element) {               \
    asm volatile(                                                                                               \
        "{\n.reg .pred adds;\n.reg .b64 b;\nsetp.ne.b32 adds, %69, 0;\nmov.b64 b, {%68, 0x40000040};\n"         \
        "wgmma.mma_async.sync.aligned.m64n128k16.f32." types                                                    \
        " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                              \
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                      \
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                      \
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "                     \
        "{%64, %65, %66, %67}, b, adds, 1, 1, 0;\n}\n"                                                          \
        : LIIF_EIGHT(d, 0), LIIF_EIGHT(d, 8), LIIF_EIGHT(d, 16), LIIF_EIGHT(d, 24), LIIF_EIGHT(d, 32),          \
          LIIF_EIGHT(d, 40), LIIF_EIGHT(d, 48), LIIF_EIGHT(d, 56)                                               \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "n"(((kSharedBase + kOffset) & 0x3FFFF) >> 4 | 1u << 16), \
          "n"(kAdds ? 1 : 0));                                                                                  \
  }
LIIF_MULTIPLY_ADD(__nv_bfloat16, "bf16.bf16")
LIIF_MULTIPLY_ADD(__half, "f16.f16")
#undef LIIF_MULTIPLY_ADD
#undef LIIF_EIGHT

// d [64, 8] of the same: with the first eight of b's columns.
template <uint32_t kOffset, bool kAdds>
__device__ __forceinline__ void multiply_add(float (&d)[4], const uint32_t (&a)[4], __nv_bfloat16) {
  asm volatile(
      "{\n.reg .pred adds;\n.reg .b64 b;\nsetp.ne.b32 adds, %9, 0;\nmov.b64 b, {%8, 0x40000040};\n"
      "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0, %1, %2, %3}, {%4, %5, %6, %7}, b, adds, 1, 1, 0;\n}\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "n"(((kSharedBase + kOffset) & 0x3FFFF) >> 4 | 1u << 16),
        "n"(kAdds ? 1 : 0));
}

// To one unit in the last place. The exact division is a call, around which ptxas spills.
__device__ __forceinline__ float reciprocal(float value) {
  float result;
  asm("rcp.approx.f32 %0, %1;" : "=f"(result) : "f"(value));
  return result;
}

// All bits of each half of a packed word that is greater than 0 or NaN: whose ReLU passes gradients.
__device__ __forceinline__ uint32_t above_zero(uint32_t word, __nv_bfloat16) {
  uint32_t bits;
  asm("set.gtu.u32.bf16x2 %0, %1, %2;" : "=r"(bits) : "r"(word), "r"(0));
  return bits;
}
__device__ __forceinline__ uint32_t above_zero(uint32_t word, __half) {
  uint32_t bits;
  asm("set.gtu.u32.f16x2 %0, %1, %2;" : "=r"(bits) : "r"(word), "r"(0));
  return bits;
}

// Four bytes that `selector` names, as prmt does: a digit above 7 is that byte's sign in all bits.
__device__ __forceinline__ uint32_t spread_signs(uint32_t low, uint32_t high, uint32_t selector) {
  uint32_t word;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(word) : "r"(low), "r"(high), "r"(selector));
  return word;
}

// pack() of two values after ReLU, which keeps NaN. Volatile: the compiler would move it to the word's use, after the
// next wait, and keep both values in registers until then.
__device__ __forceinline__ uint32_t pack_relu(float low, float high, __nv_bfloat16) {
  uint32_t word;
  asm volatile("cvt.rn.relu.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
__device__ __forceinline__ uint32_t pack_relu(float low, float high, __half) {
  uint32_t word;
  asm volatile("cvt.rn.relu.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

// pack() that the compiler does not move either.
__device__ __forceinline__ uint32_t pack_in_order(float low, float high, __nv_bfloat16) {
  uint32_t word;
  asm volatile("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
__device__ __forceinline__ uint32_t pack_in_order(float low, float high, __half) {
  uint32_t word;
  asm volatile("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

}  // namespace liif_fast
#endif
