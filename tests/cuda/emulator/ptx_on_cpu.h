// The functions of csrc/cuda/ptx.cuh for kernels that run on the CPU: same names, same roundings. A matrix product
// takes its operands from the lanes that hold them according to the PTX manual, so a misplaced fragment gives a wrong
// result.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "cuda_runtime.h"

#define LIIF_DYNAMIC_SHARED(name) unsigned char* const name = cuda_on_cpu::dynamic_shared

namespace liif_fast {

inline uint32_t float_bits(float value) {
  uint32_t word;
  std::memcpy(&word, &value, 4);
  return word;
}
inline float bits_float(uint32_t word) {
  float value;
  std::memcpy(&value, &word, 4);
  return value;
}

inline int read_thread() { return static_cast<int>(threadIdx.x); }

template <class Half>
float2 unpack(uint32_t word, Half) {
  Half halves[2];
  std::memcpy(halves, &word, 4);
  return {static_cast<float>(halves[0]), static_cast<float>(halves[1])};
}
template <class Half>
uint32_t pack(float low, float high, Half) {
  const Half halves[2] = {static_cast<Half>(low), static_cast<Half>(high)};
  uint32_t word;
  std::memcpy(&word, halves, 4);
  return word;
}
// To ten bits of mantissa, ties away from zero.
inline uint32_t round_to_tf32(float value) {
  return std::isfinite(value) ? (float_bits(value) + 0x1000u) & ~0x1fffu : float_bits(value);
}
inline float relu(float value) { return value < 0.0f ? 0.0f : value; }

// As the PTX manual has it: a's word 2 * (k half) + (lower rows), b's word (k half); a lane's quad holds k.
template <int kRowTiles, int kColTiles, class Element>
void mma_step(float (&acc)[kRowTiles][kColTiles][4], const uint4 (&a)[kRowTiles], const uint2 (&b)[kColTiles],
              Element) {
  struct Operands {
    uint32_t a[kRowTiles][4], b[kColTiles][2];
  } mine;
  static_assert(sizeof(mine.a) == sizeof(a) && sizeof(mine.b) == sizeof(b));
  std::memcpy(mine.a, a, sizeof(a));
  std::memcpy(mine.b, b, sizeof(b));
  cuda_on_cpu::block.show(&mine, "mma.sync");
  const auto of = [](unsigned lane) { return static_cast<const Operands*>(cuda_on_cpu::block.shown(lane)); };
  constexpr int kSteps = std::is_same_v<Element, float> ? 8 : 16;
  const unsigned lane = cuda_on_cpu::block.thread() % 32, row = lane / 4, quad = lane % 4;
  // This lane's columns of every n8 tile, then its rows of every m16 tile.
  float columns[kColTiles][2][kSteps];
  const auto element = [](const uint32_t* words, int k, int stride) {
    if constexpr (std::is_same_v<Element, float>) {
      return bits_float(words[k / 4 * stride]);
    } else {
      const float2 two = unpack(words[k / 8 * stride], Element{});
      return k % 2 ? two.y : two.x;
    }
  };
  const auto holder = [](int k) { return static_cast<unsigned>(kSteps == 8 ? k % 4 : k % 8 / 2); };
  for (int n = 0; n < kColTiles; ++n)
    for (unsigned e = 0; e < 2; ++e)
      for (int k = 0; k < kSteps; ++k) columns[n][e][k] = element(of((quad * 2 + e) * 4 + holder(k))->b[n], k, 1);
  for (int m = 0; m < kRowTiles; ++m)
    for (int lower = 0; lower < 2; ++lower) {
      float values[kSteps];
      for (int k = 0; k < kSteps; ++k) values[k] = element(of(row * 4 + holder(k))->a[m] + lower, k, 2);
      for (int n = 0; n < kColTiles; ++n)
        for (int e = 0; e < 2; ++e) {
          float sum = acc[m][n][lower * 2 + e];
          for (int k = 0; k < kSteps; ++k) sum += values[k] * columns[n][e][k];
          acc[m][n][lower * 2 + e] = sum;
        }
    }
  cuda_on_cpu::block.hide("mma.sync");
}

inline uint4 load_matrices(const void* row) {
  cuda_on_cpu::block.show(row, "ldmatrix");
  const unsigned lane = cuda_on_cpu::block.thread() % 32;
  uint32_t words[4];
  for (unsigned matrix = 0; matrix < 4; ++matrix)
    std::memcpy(words + matrix,
                static_cast<const char*>(cuda_on_cpu::block.shown(matrix * 8 + lane / 4)) + lane % 4 * 4, 4);
  cuda_on_cpu::block.hide("ldmatrix");
  return {words[0], words[1], words[2], words[3]};
}
inline uint4 load_transposed(const uint4* row) {
  cuda_on_cpu::block.show(row, "ldmatrix");
  const unsigned lane = cuda_on_cpu::block.thread() % 32;
  uint16_t values[4][2];
  for (unsigned matrix = 0; matrix < 4; ++matrix)
    for (unsigned i = 0; i < 2; ++i) {
      const auto from = static_cast<const char*>(cuda_on_cpu::block.shown(matrix * 8 + lane % 4 * 2 + i));
      std::memcpy(&values[matrix][i], from + lane / 4 * 2, 2);
    }
  cuda_on_cpu::block.hide("ldmatrix");
  uint4 words;
  std::memcpy(&words, values, sizeof(words));
  return words;
}
inline uint4 load_in_order(const uint4* from) { return *from; }
inline void store_once(uint4* to, uint4 words) { *to = words; }
inline void copy_async(void* shared, const void* global) { cuda_on_cpu::block.begin_copy(shared, global, 16); }
inline void wait_copies() { cuda_on_cpu::block.wait_copies(); }
inline void init_barrier(uint64_t* barrier, uint32_t arrivals) { cuda_on_cpu::block.init_barrier(barrier, arrivals); }
inline void arrive(uint64_t* barrier) { cuda_on_cpu::block.arrive(barrier, false); }
inline void arrive_after_copies(uint64_t* barrier) { cuda_on_cpu::block.arrive(barrier, true); }
inline void wait_barrier(uint64_t* barrier, uint32_t parity) { cuda_on_cpu::block.wait_phase(barrier, parity); }
template <int kCount>
void sync_threads(int number) {
  cuda_on_cpu::block.wait_numbered(static_cast<unsigned>(number), kCount, "bar.sync");
}

inline void reduce_add(float* address, float4 value) {
  address[0] += value.x;
  address[1] += value.y;
  address[2] += value.z;
  address[3] += value.w;
}

}  // namespace liif_fast
