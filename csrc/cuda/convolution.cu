// The 3x3 convolution of the folded first layer, and with turned weights its gradient of the map, on tensor cores:
// 16-bit operands, rounded while they are loaded, and sums in float32, which no convolution of PyTorch offers.
//
// A block makes 64 channels of 12 x 16 pixels, a warp 32 channels of three rows of 16 pixels. A slice of 64 channels of
// the block's pixels and of those around it lies in shared memory for all nine taps. A row of 16 pixels is one operand
// of the products of three rows of taps, so a warp reads five rows for nine products. Weights stream through a ring in
// the order of use. Two blocks share a multiprocessor: one's products run under the other's loads and stores.
//
// A pixel's slice is 128 bytes, all banks once: eight units of 8 channels. Unit u of the pixel in patch column c is in
// place u ^ (c % 8), so that ldmatrix reads a unit of eight neighbors from different banks. A thread stores a unit,
// eight threads a pixel, and lanes read neighboring 16 bytes of weights: no access to shared memory meets a conflict.
#include "cuda/common.cuh"
#include "cuda/ptx.cuh"
#include "cuda/weight_stream.cuh"

namespace liif_fast {
namespace {

template <class Element_>
struct ConvolutionTile {
  using Element = Element_;
  static constexpr int kRows = 12, kCols = 16, kOuts = 64;                    // of a block
  static constexpr int kWarpRows = 3, kWarpOuts = 32;                         // of a warp
  static constexpr int kColTiles = kWarpOuts / 8;                             // n8 tiles of a warp
  static constexpr int kSlice = 64, kSteps = kSlice / 16, kPixelBytes = 128;  // channels in shared memory
  static constexpr int kPatchRows = kRows + 2, kPatchCols = kCols + 2, kRowBytes = kPatchCols * kPixelBytes;
  static constexpr int kChunkSteps = 2;  // a chunk of weights: one column of taps, so many steps, the block's outputs
  static constexpr int kUnits = kChunkSteps * 3 * (kOuts / 16) * kWarp;  // of 16 bytes
  static constexpr int kChunks = 3 * kSteps / kChunkSteps;               // of a slice
  static constexpr int kChunkBytes = kUnits * 16;
  static constexpr int kStages = 3;
  static_assert(kRows / kWarpRows * (kOuts / kWarpOuts) == kWarps && kChunkBytes % (16 * kThreads) == 0);
};

struct ConvolutionTask : ConvolutionProblem {
  unsigned char* packed;  // [part][slice][column of taps][pair of steps] of chunks
  int parts, slices;      // of outputs, of channels
  int64_t down, across;   // blocks of a map
};

template <class T>
struct ConvolutionMemory {
  alignas(16) unsigned char patch[T::kPatchRows * T::kRowBytes];
  unsigned char ring[T::kStages * T::kChunkBytes];
  RingBarriers<T> barriers;
};

// The weight of a tap of the convolution that runs: zero in the padding.
__device__ __forceinline__ float weight_at(const ConvolutionTask& task, int64_t out, int64_t in, int tap) {
  if (out >= task.outs || in >= task.channels) return 0.0f;
  return task.transposed ? task.kernels[(in * task.outs + out) * 9 + 8 - tap]
                         : task.kernels[(out * task.channels + in) * 9 + tap];
}

// Weights in the order in which lanes take them as operands: a unit is a lane's part of two n8 tiles. A lane's column c
// of tile n is output 16 * (n / 2) + 4 * (c / 2) + 2 * (n % 2) + c % 2, so that sums of four outputs are neighbors.
template <class T>
__global__ void __launch_bounds__(kThreads) convolution_pack_kernel(const __grid_constant__ ConvolutionTask task) {
  const int64_t units = int64_t{T::kUnits} * T::kChunks * task.slices * task.parts;
  for (int64_t at = grid_warp() * kWarp + threadIdx.x % kWarp; at < units; at += grid_warps() * kWarp) {
    const int unit = static_cast<int>(at % T::kUnits), chunk = static_cast<int>(at / T::kUnits % T::kChunks);
    const int64_t slice = at / (T::kUnits * T::kChunks) % task.slices,
                  part = at / (T::kUnits * T::kChunks) / task.slices;
    const int lane = unit % kWarp, tiles = unit / kWarp % (T::kOuts / 16), row = unit / (kWarp * T::kOuts / 16) % 3;
    const int step = chunk % (T::kSteps / T::kChunkSteps) * T::kChunkSteps + unit / (kWarp * T::kOuts / 16 * 3);
    const int col = chunk / (T::kSteps / T::kChunkSteps), quad = lane % 4, column = lane / 4;
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t out = part * T::kOuts + tiles * 16 + column / 2 * 4 + i / 2 * 2 + column % 2;
      const int64_t in = slice * T::kSlice + step * 16 + i % 2 * 8 + quad * 2;
      words[i] = pack(weight_at(task, out, in, row * 3 + col), weight_at(task, out, in + 1, row * 3 + col),
                      typename T::Element{});
    }
    reinterpret_cast<uint4*>(task.packed)[at] = make_uint4(words[0], words[1], words[2], words[3]);
  }
}

// A block's place: its map, first row and column, and the part of the outputs.
struct ConvolutionPlace {
  int64_t map, row, col;
  int part;

  template <class T>
  static __device__ __forceinline__ ConvolutionPlace of_block(const ConvolutionTask& task, T) {
    const int64_t block = blockIdx.x, tile = block / task.parts, down = tile / task.across;
    return {down / task.down, down % task.down * T::kRows, tile % task.across * T::kCols,
            static_cast<int>(block % task.parts)};
  }
};

// Rounds a slice of the block's pixels and of those around them into shared memory; zeros beyond the map.
template <class T>
__device__ __forceinline__ void load_patch(const ConvolutionTask& task, const ConvolutionPlace& place, int slice,
                                           unsigned char* patch) {
  constexpr int kPixels = T::kPatchRows * T::kPatchCols, kStride = kThreads / 8, kBatch = 4;
  const int piece = static_cast<int>(threadIdx.x) % 8;  // of 8 channels
  const int64_t channel = int64_t{slice} * T::kSlice + piece * 8;
#pragma unroll 1
  for (int first = static_cast<int>(threadIdx.x) / 8; first < kPixels; first += kBatch * kStride) {
    uint4 words[kBatch][2];  // all loads are issued before the first use
    bool has[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int pixel = first + i * kStride;
      const int64_t row = place.row + pixel / T::kPatchCols - 1, col = place.col + pixel % T::kPatchCols - 1;
      has[i] = pixel < kPixels && row >= 0 && row < task.height && col >= 0 && col < task.width;
      const int64_t at = has[i] ? ((place.map * task.height + row) * task.width + col) * task.channels : 0;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t from = at + (channel + 4 * half < task.channels ? channel + 4 * half : 0);
        words[i][half] = load_in_order(reinterpret_cast<const uint4*>(task.map + from));
      }
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int pixel = first + i * kStride, col = pixel % T::kPatchCols;
      uint32_t packed[4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const bool inside = has[i] && channel + 4 * half < task.channels;
        const uint4 four = words[i][half];
        packed[2 * half] = inside ? pack(bits_float(four.x), bits_float(four.y), typename T::Element{}) : 0;
        packed[2 * half + 1] = inside ? pack(bits_float(four.z), bits_float(four.w), typename T::Element{}) : 0;
      }
      if (pixel < kPixels) {
        unsigned char* const to = patch + pixel / T::kPatchCols * T::kRowBytes + col * T::kPixelBytes;
        *reinterpret_cast<uint4*>(to + (piece ^ col % 8) * 16) = make_uint4(packed[0], packed[1], packed[2], packed[3]);
      }
    }
  }
}

template <class T>
using ConvolutionSums = float[T::kWarpRows][T::kColTiles][4];

// sums += a slice's products.
template <class T>
__device__ __forceinline__ void multiply_slice(const unsigned char* patch, WeightStream<T>& stream, int warp, int lane,
                                               ConvolutionSums<T>& sums) {
  const unsigned char* const rows = patch + warp / 2 * T::kWarpRows * T::kRowBytes;
#pragma unroll 1
  for (int chunk = 0; chunk < T::kChunks; ++chunk) {
    const int col = lane % 16 + chunk / (T::kSteps / T::kChunkSteps);
    const uint4* const weights =
        reinterpret_cast<const uint4*>(stream.wait()) + warp % 2 * T::kColTiles / 2 * kWarp + lane;
#pragma unroll
    for (int step = 0; step < T::kChunkSteps; ++step) {
      const int unit = (chunk % (T::kSteps / T::kChunkSteps) * T::kChunkSteps + step) * 2 + lane / 16;
      const unsigned char* const from = rows + col * T::kPixelBytes + (unit ^ col % 8) * 16;
      uint4 a[T::kWarpRows + 2];
#pragma unroll
      for (int row = 0; row < T::kWarpRows + 2; ++row) a[row] = load_matrices(from + row * T::kRowBytes);
#pragma unroll
      for (int tap = 0; tap < 3; ++tap) {
        uint2 b[T::kColTiles];
#pragma unroll
        for (int n = 0; n < T::kColTiles; n += 2) {
          const uint4 both = weights[((step * 3 + tap) * (T::kOuts / 16) + n / 2) * kWarp];
          b[n] = make_uint2(both.x, both.y);
          b[n + 1] = make_uint2(both.z, both.w);
        }
        if (step == T::kChunkSteps - 1 && tap == 2) stream.release();
        const uint4 operands[T::kWarpRows] = {a[tap], a[tap + 1], a[tap + 2]};
        mma_step(sums, operands, b, typename T::Element{});
        if (step == 0 && tap == 0) stream.refill();  // under the products
      }
    }
  }
}

template <class T>
__device__ __forceinline__ void store_sums(const ConvolutionTask& task, const ConvolutionPlace& place, int warp,
                                           int lane, const ConvolutionSums<T>& sums) {
  const int64_t out = int64_t{place.part} * T::kOuts + warp % 2 * T::kWarpOuts + lane % 4 * 4;
#pragma unroll
  for (int m = 0; m < T::kWarpRows; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t row = place.row + warp / 2 * T::kWarpRows + m, col = place.col + half * 8 + lane / 4;
      float* const to = task.out + ((place.map * task.height + row) * task.width + col) * task.outs + out;
#pragma unroll
      for (int n = 0; n < T::kColTiles; n += 2)
        if (row < task.height && col < task.width && out + n * 8 < task.outs)
          *reinterpret_cast<float4*>(to + n * 8) = make_float4(sums[m][n][2 * half], sums[m][n][2 * half + 1],
                                                               sums[m][n + 1][2 * half], sums[m][n + 1][2 * half + 1]);
    }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) convolution_kernel(const __grid_constant__ ConvolutionTask task) {
  LIIF_DYNAMIC_SHARED(shared);
  ConvolutionMemory<T>& memory = *reinterpret_cast<ConvolutionMemory<T>*>(shared);
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  const ConvolutionPlace place = ConvolutionPlace::of_block(task, T{});
  const int chunks = task.slices * T::kChunks;
  WeightStream<T> stream(task.packed + int64_t{place.part} * chunks * T::kChunkBytes, chunks, memory.ring,
                         memory.barriers);
  ConvolutionSums<T> sums = {};
#pragma unroll 1
  for (int slice = 0; slice < task.slices; ++slice) {
    if (slice > 0) __syncthreads();  // the patch has been read
    load_patch<T>(task, place, slice, memory.patch);
    __syncthreads();
    multiply_slice<T>(memory.patch, stream, warp, lane, sums);
  }
  store_sums<T>(task, place, warp, lane, sums);
  stream.finish();
}

int64_t ceil_divide(int64_t value, int64_t by) { return (value + by - 1) / by; }

// f(ConvolutionTile{}, task).
template <class F>
auto with_convolution(const ConvolutionProblem& problem, void* packed, const F& f) {
  using T = ConvolutionTile<__half>;  // whose sizes are those of the other
  ConvolutionTask task = {};
  static_cast<ConvolutionProblem&>(task) = problem;
  task.packed = static_cast<unsigned char*>(packed);
  task.parts = static_cast<int>(ceil_divide(problem.outs, T::kOuts));
  task.slices = static_cast<int>(ceil_divide(problem.channels, T::kSlice));
  task.down = ceil_divide(problem.height, T::kRows);
  task.across = ceil_divide(problem.width, T::kCols);
  return problem.in_bfloat16 ? f(ConvolutionTile<__nv_bfloat16>{}, task) : f(T{}, task);
}

}  // namespace

int64_t convolution_workspace(const ConvolutionProblem& problem) {
  return with_convolution(problem, nullptr, [](auto tile, const ConvolutionTask& task) {
    using T = decltype(tile);
    return int64_t{T::kChunkBytes} * T::kChunks * task.slices * task.parts;
  });
}

const char* launch_convolution(const ConvolutionProblem& problem, void* workspace, void* stream) {
  if (problem.channels > kMaxConvolutionChannels || problem.outs > kMaxConvolutionChannels)
    return "the convolution has too many channels";
  return with_convolution(problem, workspace, [&](auto tile, const ConvolutionTask& task) -> const char* {
    using T = decltype(tile);
    const int64_t blocks = task.batch * task.down * task.across * task.parts;
    if (blocks == 0) return nullptr;
    if (blocks > INT32_MAX) return "the map of the convolution has too many pixels";
    const int64_t warps = convolution_workspace(problem) / (16 * kWarp);
    if (const char* error = launch(convolution_pack_kernel<T>, blocks_for(warps), stream, task)) return error;
    constexpr int kBytes = static_cast<int>(sizeof(ConvolutionMemory<T>));
    if (const char* error = allow_shared<convolution_kernel<T>>(kBytes)) return error;
    return launch(convolution_kernel<T>, LaunchSize{static_cast<unsigned>(blocks), kBytes}, stream, task);
  });
}

}  // namespace liif_fast
