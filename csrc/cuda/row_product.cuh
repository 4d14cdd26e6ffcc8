// Sums over rows of the products of two operands' channels, as weights' gradients are: sums[a][b] = sum over rows of
// A[row][a] * B[row][b], in 16 bits with float32 sums. Both operands have their channels next to each other, so
// fragments are loaded transposed (ldmatrix.trans). A block sums a part of the rows; add_parts adds the blocks' sums in
// their order, so that results repeat bit for bit.
//
// Rows pass through a ring of stages in shared memory. An operand fills its half of a stage: by asynchronous copies, or
// with values that it makes from what it has loaded. It has two functions, which all threads call stage after stage:
//
//     begin(half)   under the stage's empty barrier, before products of an earlier stage: copies, or loads to registers
//     finish(half)  after these products: ordinary stores
//
// The 16-byte unit u of a row lies at place u ^ (row % 8): neither stores nor ldmatrix meet conflicts.
//
// mma.sync is enough: two arrays of 256 channels give 2 * 256 * 256 operations for 2 * 512 bytes of a row. The 3 TB/s
// of an H100's memory then feed 384 TFLOP/s, and mma.sync reaches about 600 (wgmma: 989).
#pragma once

#include "cuda/common.cuh"
#include "cuda/ptx.cuh"

namespace liif_fast {

// kA_, kB_: channels of the operands, multiples of 64. A block of eight warps has all sums of the tile in its
// registers.
template <class Element_, int kA_, int kB_>
struct ProductTile {
  using Element = Element_;
  static constexpr int kA = kA_, kB = kB_, kSums = kA * kB;
  static constexpr int kRows = 32, kStages = 4, kAhead = 2;  // of a stage; of the ring; copied before they are used
  static constexpr int kWarpRows = 2, kWarpCols = kWarps / kWarpRows;
  static constexpr int kWarpA = kA / kWarpRows, kWarpB = kB / kWarpCols;  // channels of a warp
  static constexpr int kRowTiles = kWarpA / 16, kColTiles = kWarpB / 8;
  static constexpr int kHalfBytes = kRows * kA * 2, kStageBytes = kHalfBytes + kRows * kB * 2;
  static_assert(kA % 64 == 0 && kB % 64 == 0 && kSums <= 128 * kThreads, "sums fit into registers");
};

template <class T>
using ProductSums = float[T::kRowTiles][T::kColTiles][4];

// A block's shared memory.
template <class T>
struct ProductSpace {
  unsigned char ring[T::kStages][T::kStageBytes];
  uint64_t full[T::kStages], empty[T::kStages];
};

// A thread's units of an operand's half of a stage: unit `unit` of rows row(0), row(1) and so on.
template <class T, int kChannels>
struct StageUnits {
  static constexpr int kUnits = kChannels / 8, kCount = T::kRows * kUnits / kThreads, kStep = kThreads / kUnits;
  static_assert(kStep % 8 == 0 && kCount > 0, "all of a thread's rows have the same place for a unit");
  int unit = read_thread() % kUnits, first = read_thread() / kUnits;

  __device__ __forceinline__ int row(int i) const { return first + i * kStep; }
  __device__ __forceinline__ uint4* place(unsigned char* half, int i) const {
    return reinterpret_cast<uint4*>(half) + row(i) * kUnits + (unit ^ first % 8);
  }
};

// An operand in memory, in the products' dtype. rows: its first channel of the first row; stride: from row to row.
template <class T, int kChannels>
class CopiedRows {
 public:
  __device__ __forceinline__ CopiedRows(const void* rows, int64_t stride) : stride_(stride) {
    from_ = static_cast<const typename T::Element*>(rows) + units_.row(0) * stride + units_.unit * 8;
  }
  __device__ __forceinline__ void begin(unsigned char* half) {
#pragma unroll
    for (int i = 0; i < Units::kCount; ++i) copy_async(units_.place(half, i), from_ + i * Units::kStep * stride_);
    from_ += T::kRows * stride_;
  }
  __device__ __forceinline__ void finish(unsigned char*) {}

 private:
  using Units = StageUnits<T, kChannels>;
  Units units_;
  const typename T::Element* from_;
  int64_t stride_;
};

// A block's ring, for any number of products one after the other.
template <class T>
class RowProduct {
 public:
  __device__ __forceinline__ explicit RowProduct(ProductSpace<T>& space) : space_(space) {
    if (threadIdx.x < T::kStages) {
      init_barrier(&space.full[threadIdx.x], kThreads + kWarps);  // a thread's copies, a warp's stores
      init_barrier(&space.empty[threadIdx.x], kWarps);
    }
    __syncthreads();
  }

  // sums = those over as many stages of rows.
  template <class A, class B>
  __device__ __forceinline__ void run(int stages, A a, B b, ProductSums<T>& sums) {
#pragma unroll
    for (int m = 0; m < T::kRowTiles; ++m)
#pragma unroll
      for (int n = 0; n < T::kColTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[m][n][i] = 0.0f;
#pragma unroll 1
    for (int step = -T::kAhead; step < stages; ++step) {
      const bool fills = step + T::kAhead < stages;
      unsigned char* const half = space_.ring[stage(filled_)];
      uint64_t* const full = &space_.full[stage(filled_)];
      if (fills) {
        wait_barrier(&space_.empty[stage(filled_)], phase(filled_) ^ 1);
        a.begin(half);
        b.begin(half + T::kHalfBytes);
        arrive_after_copies(full);
        filled_ = next(filled_);
      }
      if (step >= 0) multiply(sums);
      if (fills) {
        a.finish(half);
        b.finish(half + T::kHalfBytes);
        arrive_as_warp(full);
      }
    }
  }

  // store(a, b, sums of channel a with b and b + 1) for all of a thread's sums.
  template <class Store>
  static __device__ __forceinline__ void for_each(const ProductSums<T>& sums, const Store& store) {
    const int thread = read_thread(), warp = thread / kWarp, lane = thread % kWarp;
    const int a = warp / T::kWarpCols * T::kWarpA + lane / 4, b = warp % T::kWarpCols * T::kWarpB + lane % 4 * 2;
#pragma unroll
    for (int m = 0; m < T::kRowTiles; ++m)
#pragma unroll
      for (int n = 0; n < T::kColTiles; ++n)
#pragma unroll
        for (int lower = 0; lower < 2; ++lower)
          store(a + m * 16 + lower * 8, b + n * 8, make_float2(sums[m][n][2 * lower], sums[m][n][2 * lower + 1]));
  }

 private:
  // A stage's turn counts through two rounds of the ring.
  static __device__ __forceinline__ int stage(int turn) { return turn % T::kStages; }
  static __device__ __forceinline__ uint32_t phase(int turn) { return turn / T::kStages; }
  static __device__ __forceinline__ int next(int turn) { return (turn + 1) % (2 * T::kStages); }

  static __device__ __forceinline__ void arrive_as_warp(uint64_t* barrier) {
    __syncwarp();
    if (threadIdx.x % kWarp == 0) arrive(barrier);
  }

  // sums += the products of the current stage, which then is the next one.
  __device__ __forceinline__ void multiply(ProductSums<T>& sums) {
    const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
    const int at = lane % 8, low = lane / 8 % 2, high = lane / 16;  // of the row that the lane addresses; its matrix
    const int first_a = warp / T::kWarpCols * (T::kWarpA / 8), first_b = warp % T::kWarpCols * (T::kWarpB / 8);
    const uint4* const rows_a = reinterpret_cast<const uint4*>(space_.ring[stage(used_)]);
    const uint4* const rows_b = rows_a + T::kHalfBytes / 16;
    wait_barrier(&space_.full[stage(used_)], phase(used_));
#pragma unroll
    for (int k = 0; k < T::kRows; k += 16) {
      uint4 a[T::kRowTiles];
#pragma unroll
      for (int m = 0; m < T::kRowTiles; ++m)
        a[m] = load_transposed(rows_a + (k + high * 8 + at) * (T::kA / 8) + ((first_a + 2 * m + low) ^ at));
      uint2 b[T::kColTiles];
#pragma unroll
      for (int n = 0; n < T::kColTiles; n += 2) {
        const uint4 both = load_transposed(rows_b + (k + low * 8 + at) * (T::kB / 8) + ((first_b + n + high) ^ at));
        b[n] = make_uint2(both.x, both.y);
        b[n + 1] = make_uint2(both.z, both.w);
      }
      if (k + 16 == T::kRows) arrive_as_warp(&space_.empty[stage(used_)]);  // all of the stage has been read
      mma_step(sums, a, b, typename T::Element{});
    }
    used_ = next(used_);
  }

  ProductSpace<T>& space_;
  int filled_ = 0, used_ = 0;
};

// The part of the rows that a block sums: stages first to first + count.
struct RowPart {
  int64_t first;
  int count;

  __device__ __forceinline__ RowPart(int64_t stages, int part, int parts)
      : first(stages * part / parts), count(static_cast<int>(stages * (part + 1) / parts - first)) {}
};

// The sum over parts, from the first to the last, of four neighboring numbers. stride: from part to part.
__device__ __forceinline__ float4 add_parts(const float* first, int parts, int64_t stride) {
  float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 8
  for (int part = 0; part < parts; ++part) {
    const float4 one = __ldg(reinterpret_cast<const float4*>(first + part * stride));
    sum.x += one.x;
    sum.y += one.y;
    sum.z += one.z;
    sum.w += one.w;
  }
  return sum;
}

}  // namespace liif_fast
