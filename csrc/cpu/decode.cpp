// query, render and metasr_query on the CPU: packs the weights once, cuts the tiles into one share a thread.
#include <algorithm>
#include <cstring>

#include "cpu/kernels.h"
#include "cpu/ops.h"
#include "cpu/parallel.h"

namespace liif_fast {
namespace {

template <class T>
const MatrixKernels<T>& matrix_kernels();
template <>
const MatrixKernels<float>& matrix_kernels<float>() {
  return kernels().single_kernels;
}
template <>
const MatrixKernels<double>& matrix_kernels<double>() {
  return kernels().double_kernels;
}

template <class T>
int64_t tile_count(const QueryProblem<T>& p, int tile_rows) {
  const int64_t queries = tile_rows / p.corners;
  return p.batch * ((p.queries + queries - 1) / queries);
}

// K: MatrixKernels<T> or Bf16Kernels. forward_tiles: which of its forwards.
template <class T, class K, class F>
void run_forward(const QueryProblem<T>& p, const K& kernels, F forward_tiles, int tile_rows) {
  const int64_t tiles = tile_count(p, tile_rows), shares = std::min(thread_count(), tiles);
  if (tiles == 0) return;
  const Blocks packed(1, kernels.packed_bytes(p, false));
  kernels.pack(p, false, packed[0]);
  const Blocks scratch(shares, kernels.forward_scratch_bytes(p));
  parallel_shares(tiles, shares, [&](int64_t share, int64_t begin, int64_t end) {
    forward_tiles(p, packed[0], begin, end, scratch[share]);
  });
}

// Tiles whose latent gradients are kept before they are added up: 4 MB a thread at 256 channels.
constexpr int64_t kStepTiles = 32;

// K: MatrixKernels<T> or Bf16Kernels. common: what both share.
template <class T, class K>
void run_backward(const QueryProblem<T>& p, const QueryGrads<T>& grads, const K& kernels,
                  const MatrixKernels<T>& common) {
  const int64_t tiles = tile_count(p, common.tile_rows), shares = std::min(thread_count(), tiles);
  if (tiles == 0) return;
  const Blocks packed(1, kernels.packed_bytes(p, true));
  kernels.pack(p, true, packed[0]);
  const Blocks scratch(shares, kernels.backward_scratch_bytes(p));
  const size_t sums_bytes = common.sums_bytes(p);
  const Blocks sums(shares, sums_bytes);
  for (int64_t share = 0; share < shares; ++share) std::memset(sums[share], 0, sums_bytes);

  const int64_t step_tiles = std::min(kStepTiles * shares, tiles), step_rows = step_tiles * common.tile_rows;
  const Blocks rows(1, static_cast<size_t>(step_rows * p.width) * sizeof(T));
  const Blocks latents(1, static_cast<size_t>(step_rows) * sizeof(int64_t));
  T* const latent_rows = reinterpret_cast<T*>(rows[0]);
  int64_t* const row_latent = reinterpret_cast<int64_t*>(latents[0]);
  for (int64_t step = 0; step < tiles; step += step_tiles) {
    const int64_t count = std::min(step_tiles, tiles - step);
    parallel_shares(count, shares, [&](int64_t share, int64_t begin, int64_t end) {
      kernels.backward_tiles(p, grads, packed[0], step + begin, step + end, scratch[share], sums[share], step,
                             latent_rows, row_latent);
    });
    parallel_shares(shares, shares, [&](int64_t share, int64_t, int64_t) {
      common.scatter_rows(latent_rows, row_latent, count * common.tile_rows, p.width, share, shares, grads.latent_map);
    });
  }
  for (int64_t share = 0; share < shares; ++share) common.add_sums(p, sums[share], grads);
}

}  // namespace

template <class T>
void query_forward(const QueryProblem<T>& p) {
  const MatrixKernels<T>& kernels = matrix_kernels<T>();
  run_forward(p, kernels, kernels.forward_tiles, kernels.tile_rows);
}
template void query_forward(const QueryProblem<float>&);
template void query_forward(const QueryProblem<double>&);

void query_forward_bf16(const QueryProblem<float>& p, bool bf16_map) {
  const Bf16Kernels& kernels = *bf16_kernels();
  run_forward(p, kernels, bf16_map ? kernels.forward_tiles_bf16_map : kernels.forward_tiles,
              matrix_kernels<float>().tile_rows);
}

template <class T>
void query_backward(const QueryProblem<T>& p, const QueryGrads<T>& grads) {
  run_backward(p, grads, matrix_kernels<T>(), matrix_kernels<T>());
}
template void query_backward(const QueryProblem<float>&, const QueryGrads<float>&);
template void query_backward(const QueryProblem<double>&, const QueryGrads<double>&);

void query_backward_bf16(const QueryProblem<float>& p, const QueryGrads<float>& grads) {
  run_backward(p, grads, *bf16_kernels(), matrix_kernels<float>());
}

template <class T>
void metasr_query_forward(const MetasrProblem<T>& p) {
  const MatrixKernels<T>& kernels = matrix_kernels<T>();
  const int64_t count = p.batch * p.queries, shares = std::min(thread_count(), count);
  if (count == 0) return;
  const Blocks scratch(shares, kernels.metasr_scratch_bytes(p));
  parallel_shares(count, shares, [&](int64_t share, int64_t begin, int64_t end) {
    kernels.metasr_forward(p, begin, end, scratch[share]);
  });
}
template void metasr_query_forward(const MetasrProblem<float>&);
template void metasr_query_forward(const MetasrProblem<double>&);

template <class T>
void metasr_query_backward(const MetasrProblem<T>& p, const MetasrGrads<T>& grads) {
  const MatrixKernels<T>& kernels = matrix_kernels<T>();
  const int64_t count = p.batch * p.queries, shares = std::min(thread_count(), count);
  if (count == 0) return;
  const Blocks scratch(shares, kernels.metasr_scratch_bytes(p));
  parallel_shares(count, shares, [&](int64_t share, int64_t begin, int64_t end) {
    kernels.metasr_backward(p, grads, begin, end, scratch[share]);
  });
  for (int64_t share = 0; share < shares; ++share) kernels.metasr_add_sums(p, scratch[share], grads);
  parallel_shares(shares, shares, [&](int64_t share, int64_t, int64_t) {
    kernels.metasr_scatter(p, grads, share, shares, scratch[share]);
  });
}
template void metasr_query_backward(const MetasrProblem<float>&, const MetasrGrads<float>&);
template void metasr_query_backward(const MetasrProblem<double>&, const MetasrGrads<double>&);

}  // namespace liif_fast
