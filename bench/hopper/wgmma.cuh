// The Hopper instructions that the probes use, one function each: barriers in shared memory, bulk copies, clusters,
// register hand-over, wgmma with A in registers.
#pragma once

#include <cstdint>

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// ---- barriers ------------------------------------------------------------------------------------------------------

__device__ inline void init_barrier(uint64_t* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// Makes initialized barriers visible to the other CTA and to the copy engine.
__device__ inline void fence_barrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// Waits until the phase of that parity has ended.
__device__ inline void wait_barrier(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

__device__ inline void arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Arrives at the barrier with the same offset in CTA `rank` of the cluster, which may be this CTA. The arrival has no
// cluster scope: that scope would add a fence of the whole GPU, and this thread has written no data for the other CTA.
__device__ inline void arrive_remote(uint64_t* barrier, uint32_t rank) {
  asm volatile(
      "{\n"
      ".reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
}

// Arrives once; the phase also waits for this number of copied bytes.
__device__ inline void expect_bytes(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

// Loads two 16-bit numbers. Volatile, so that the compiler does not hoist all loads of a row and spill half of them.
__device__ inline uint32_t load_pair(const void* source) {
  uint32_t pair;
  asm volatile("ld.global.b32 %0, [%1];" : "=r"(pair) : "l"(source));
  return pair;
}

// ---- clusters and copies -------------------------------------------------------------------------------------------

__device__ inline uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ inline void sync_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

__device__ inline void copy_bulk(void* target, const void* source, uint32_t bytes, uint64_t* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(target)),
               "l"(source), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}

// Copies to the same offset in every CTA of the mask, and arrives at the barrier with the same offset there.
__device__ inline void copy_bulk_multicast(void* target, const void* source, uint32_t bytes, uint64_t* barrier,
                                           uint16_t mask) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], "
      "%4;" ::"r"(shared_address(target)),
      "l"(source), "r"(bytes), "r"(shared_address(barrier)), "h"(mask)
      : "memory");
}

template <int kRegisters>
__device__ inline void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ inline void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// ---- wgmma ---------------------------------------------------------------------------------------------------------

// Index of (output, input) in a block of 64 inputs: rows of 128 bytes, whose 16-byte chunks are permuted by the row
// index modulo 8 (the 128-byte swizzle).
__host__ __device__ constexpr int swizzled(int out, int in) { return out * 64 + ((in / 8) ^ (out % 8)) * 8 + in % 8; }

// The hardware computes an element's address from the unswizzled one: bits 4 to 6 are XORed with bits 7 to 9.
constexpr bool swizzle_fits_the_hardware() {
  for (int out = 0; out < 256; ++out) {
    for (int in = 0; in < 64; ++in) {
      const int address = out / 8 * 1024 + out % 8 * 128 + in * 2;
      if (swizzled(out, in) * 2 != (address ^ (address >> 7 & 7) << 4)) return false;
    }
  }
  return true;
}
static_assert(swizzle_fits_the_hardware(), "packing and descriptor must agree");

// Descriptor of B at an address divisible by 1024: K-major, 128-byte swizzle, groups of 8 rows 1024 bytes apart.
__device__ inline uint64_t describe(const void* block) {
  const uint64_t address = (shared_address(block) & 0x3FFFF) >> 4;
  return address | (uint64_t{1} << 16) | (uint64_t{1024 >> 4} << 32) | (uint64_t{1} << 62);
}

__device__ inline void fence_registers() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int kPending>
__device__ inline void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

__device__ inline uint32_t pack_relu(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.relu.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

#define LIIF_EIGHT(d, i)                                                                                      \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])

// d [64, 128] (+)= a [64, 16] b [16, 128]; each thread holds 64 numbers of d and 4 registers of a.
__device__ inline void multiply_add(float (&d)[64], const uint32_t (&a)[4], uint64_t b, bool add) {
  asm volatile(
      "{\n"
      ".reg .pred add;\n"
      "setp.ne.b32 add, %69, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
      "{%64, %65, %66, %67}, %68, add, 1, 1, 0;\n"
      "}\n"
      : LIIF_EIGHT(d, 0), LIIF_EIGHT(d, 8), LIIF_EIGHT(d, 16), LIIF_EIGHT(d, 24), LIIF_EIGHT(d, 32), LIIF_EIGHT(d, 40),
        LIIF_EIGHT(d, 48), LIIF_EIGHT(d, 56)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)));
}

#undef LIIF_EIGHT
