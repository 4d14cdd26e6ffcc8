// The latents on both sides of every query, one axis at a time, found before the Hopper decode: its producers have no
// registers for geometry.h. On a grid these are few: one for each row and each column of the window.
#pragma once

#include "cuda/common.cuh"
#include "cuda/decode/launch.h"
#include "cuda/wgmma.cuh"
#include "geometry.h"

namespace liif_fast {

// The latents on the sides -1 and 1 of a query; without local ensemble the nearest one twice. Rows are counted through
// the batch's maps in memory.
struct alignas(16) AxisNeighbors {
  int index[2];
  float rel[2];
};

struct Quotient {
  int quotient, remainder;
};
// Division by a number that the host knows.
struct Divisor {
  int number;
  uint32_t inverse;  // 2^32 / number, rounded down

  static Divisor of(int64_t number) {
    return {static_cast<int>(number), static_cast<uint32_t>(number > 1 ? (int64_t{1} << 32) / number : 0xffffffff)};
  }
  // at: not negative. The estimate is at most one too small.
  __device__ __forceinline__ Quotient divide(int at) const {
    const int estimate = static_cast<int>(static_cast<uint64_t>(inverse) * static_cast<uint32_t>(at) >> 32);
    const int rest = at - estimate * number;
    return rest < number ? Quotient{estimate, rest} : Quotient{estimate + 1, rest - number};
  }
};

struct HopperTask : DecodeTask {
  const AxisNeighbors *neighbor_rows, *neighbor_cols;  // at coordinates: of every query
  Divisor columns, entry_queries;                      // of the window; queries of a batch entry
  int padded_width;                                    // of every layer but the last
  SavedActivations saved;                              // for a backward
  int saved_tile_rows;                                 // of the tiles in `saved`
  int saved_tile;                                      // of this launch's first tile among those in `saved`
};

// hopper.cuh defines it, one .cu for each policy instantiates it.
template <MmaPolicy kPolicy>
const char* launch_hopper(const HopperTask& task, void* stream);
template <MmaPolicy kPolicy>
const char* launch_hopper_backward(const HopperTask& task, const BackwardArrays& backward, void* stream);

// One of area_weights' four.
__device__ __forceinline__ float corner_weight(const float (&rel_row)[2], const float (&rel_col)[2], bool lower,
                                               bool right) {
  const float epsilon = static_cast<float>(kEpsArea);
  float total = 0.0f;
#pragma unroll
  for (int corner = 0; corner < 4; ++corner)
    total += add_rounded(fabsf(mul_rounded(rel_row[corner >> 1], rel_col[corner & 1])), epsilon);
  const float row = lower ? rel_row[0] : rel_row[1], col = right ? rel_col[0] : rel_col[1];
  return add_rounded(fabsf(mul_rounded(row, col)), epsilon) * reciprocal(total);
}

}  // namespace liif_fast
