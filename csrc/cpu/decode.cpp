// The fused decodes on the CPU, LIIF's and MetaSR's: weights are packed once, tiles are cut into one shard per thread.
// Likewise the gradient of the convolution before them.
#include <algorithm>
#include <cstring>
#include <type_traits>

#include "cpu/dispatch.h"
#include "cpu/entry_points.h"
#include "cpu/parallel.h"
#include "cpu/slabs.h"

namespace liif_fast {
namespace {

template <class T>
const MatrixKernels<T>& matrix_kernels() {
  if constexpr (std::is_same_v<T, float>)
    return kernels().float_kernels;
  else
    return kernels().double_kernels;
}

template <class T>
int64_t tile_count(const DecodeProblem<T>& p, int tile_rows) {
  const int64_t queries = tile_rows / p.corners;
  return p.batch * ((p.queries + queries - 1) / queries);
}

// forward_tiles: one of the kernels' forwards.
template <class T, class F>
void run_forward(const DecodeProblem<T>& p, const DecodeKernels<T>& kernels, F forward_tiles, int tile_rows,
                 const SavedActivations& saved) {
  const int64_t tiles = tile_count(p, tile_rows), shards = std::min(thread_count(), tiles);
  if (tiles == 0) return;
  const ThreadBuffers packed(1, kernels.packed_bytes(p, false));
  kernels.pack(p, false, packed[0]);
  const ThreadBuffers scratch(shards, kernels.forward_scratch_bytes(p));
  parallel_shards(tiles, shards, [&](int64_t shard, int64_t begin, int64_t end) {
    forward_tiles(p, packed[0], begin, end, scratch[shard], saved);
  });
}

// Tiles of a thread in a chunk. The latent gradients of a chunk are stored, then added up: 3 MB per thread at 256 float
// channels.
constexpr int64_t kChunkTiles = 32;

// common: the functions that do not depend on the operands' dtype.
template <class T>
void run_backward(const DecodeProblem<T>& p, const DecodeGrads<T>& grads, const DecodeKernels<T>& kernels,
                  const MatrixKernels<T>& common, const SavedActivations& saved) {
  const int64_t tiles = tile_count(p, common.tile_rows), shards = std::min(thread_count(), tiles);
  if (tiles == 0) return;
  const ThreadBuffers packed(1, kernels.packed_bytes(p, true));
  kernels.pack(p, true, packed[0]);
  const ThreadBuffers scratch(shards, kernels.backward_scratch_bytes(p));
  const size_t sums_bytes = common.sums_bytes(p);
  const ThreadBuffers sums(shards, sums_bytes);
  for (int64_t shard = 0; shard < shards; ++shard) std::memset(sums[shard], 0, sums_bytes);

  const int64_t chunk_tiles = std::min(kChunkTiles * shards, tiles), chunk_rows = chunk_tiles * common.tile_rows;
  const ThreadBuffers rows(1, static_cast<size_t>(chunk_rows * p.width) * sizeof(T));
  const ThreadBuffers latents(1, static_cast<size_t>(chunk_rows) * sizeof(int64_t));
  T* const latent_rows = reinterpret_cast<T*>(rows[0]);
  int64_t* const row_latent = reinterpret_cast<int64_t*>(latents[0]);
  for (int64_t chunk = 0; chunk < tiles; chunk += chunk_tiles) {
    const int64_t count = std::min(chunk_tiles, tiles - chunk);
    parallel_shards(count, shards, [&](int64_t shard, int64_t begin, int64_t end) {
      kernels.backward_tiles(
          p, grads,
          {chunk + begin, chunk + end, chunk, packed[0], scratch[shard], sums[shard], latent_rows, row_latent}, saved);
    });
    parallel_shards(shards, shards, [&](int64_t shard, int64_t, int64_t) {
      common.scatter_rows(latent_rows, row_latent, count * common.tile_rows, p.width, shard, shards, grads.latent_map);
    });
  }
  for (int64_t shard = 0; shard < shards; ++shard) common.add_sums(p, sums[shard], grads);
}

}  // namespace

template <class T>
SavedLayout saved_layout(const DecodeProblem<T>& p, bool bf16) {
  const MatrixKernels<T>& kernels = matrix_kernels<T>();
  size_t bytes = kernels.saved_tile_bytes(p);
  if constexpr (std::is_same_v<T, float>)
    if (bf16) bytes = bf16_kernels()->saved_tile_bytes(p);
  return {static_cast<int64_t>(bytes), kernels.tile_rows};
}
template SavedLayout saved_layout(const DecodeProblem<float>&, bool);
template SavedLayout saved_layout(const DecodeProblem<double>&, bool);

template <class T>
void decode_forward(const DecodeProblem<T>& p, bool bf16, bool bf16_map, char* saved) {
  const MatrixKernels<T>& kernels = matrix_kernels<T>();
  const SavedActivations keep = in_slab(saved, saved_layout(p, bf16).tile_bytes);
  if constexpr (std::is_same_v<T, float>) {
    if (bf16) {
      const Bf16Kernels& narrow = *bf16_kernels();
      return run_forward<float>(p, narrow, bf16_map ? narrow.forward_tiles_bf16_map : narrow.forward_tiles,
                                kernels.tile_rows, keep);
    }
  }
  run_forward<T>(p, kernels, kernels.forward_tiles, kernels.tile_rows, keep);
}
template void decode_forward(const DecodeProblem<float>&, bool, bool, char*);
template void decode_forward(const DecodeProblem<double>&, bool, bool, char*);

template <class T>
void decode_backward(const DecodeProblem<T>& p, const DecodeGrads<T>& grads, bool bf16, char* saved) {
  const MatrixKernels<T>& kernels = matrix_kernels<T>();
  const SavedActivations kept = in_slab(saved, saved_layout(p, bf16).tile_bytes);
  if constexpr (std::is_same_v<T, float>)
    if (bf16) return run_backward<float>(p, grads, *bf16_kernels(), kernels, kept);
  run_backward<T>(p, grads, kernels, kernels, kept);
}
template void decode_backward(const DecodeProblem<float>&, const DecodeGrads<float>&, bool, char*);
template void decode_backward(const DecodeProblem<double>&, const DecodeGrads<double>&, bool, char*);

template <class T>
void metasr_forward(const MetasrProblem<T>& p) {
  const MatrixKernels<T>& kernels = matrix_kernels<T>();
  const int64_t count = p.batch * p.queries, shards = std::min(thread_count(), count);
  if (count == 0) return;
  const ThreadBuffers scratch(shards, kernels.metasr_scratch_bytes(p));
  parallel_shards(count, shards, [&](int64_t shard, int64_t begin, int64_t end) {
    kernels.metasr_forward(p, begin, end, scratch[shard]);
  });
}
template void metasr_forward(const MetasrProblem<float>&);
template void metasr_forward(const MetasrProblem<double>&);

template <class T>
void metasr_backward(const MetasrProblem<T>& p, const MetasrGrads<T>& grads) {
  const MatrixKernels<T>& kernels = matrix_kernels<T>();
  const int64_t count = p.batch * p.queries, shards = std::min(thread_count(), count);
  if (count == 0) return;
  const ThreadBuffers scratch(shards, kernels.metasr_scratch_bytes(p));
  parallel_shards(count, shards, [&](int64_t shard, int64_t begin, int64_t end) {
    kernels.metasr_backward(p, grads, begin, end, scratch[shard]);
  });
  for (int64_t shard = 0; shard < shards; ++shard) kernels.metasr_add_sums(p, scratch[shard], grads);
  parallel_shards(shards, shards, [&](int64_t shard, int64_t, int64_t) {
    kernels.metasr_scatter(p, grads, shard, shards, scratch[shard]);
  });
}
template void metasr_backward(const MetasrProblem<float>&, const MetasrGrads<float>&);
template void metasr_backward(const MetasrProblem<double>&, const MetasrGrads<double>&);

template <class T>
void kernel_grads(const ConvolutionGradsProblem<T>& p) {
  const MatrixKernels<T>& kernels = matrix_kernels<T>();
  const int64_t rows = p.batch * p.height, shards = std::min(thread_count(), rows);
  if (rows == 0 || p.width == 0) return;
  const ThreadBuffers scratch(shards, kernels.kernel_grads_scratch_bytes(p));
  parallel_shards(rows, shards, [&](int64_t shard, int64_t begin, int64_t end) {
    kernels.kernel_grads_rows(p, begin, end, scratch[shard]);
  });
  for (int64_t shard = 0; shard < shards; ++shard) kernels.add_kernel_grads(p, scratch[shard]);
}
template void kernel_grads(const ConvolutionGradsProblem<float>&);
template void kernel_grads(const ConvolutionGradsProblem<double>&);

}  // namespace liif_fast
