// gather's fast kernel, for channels-last feat with unfolding and local ensemble. The four corners of a query read the
// features of 36 latents, but only 4x4 different ones. A warp copies these to shared memory in 16-byte vectors, 128
// bytes per latent and step, and writes the rows of x from there, 128 bytes per instruction. Every feature of feat is
// read once per query instead of up to nine times, and no lane reads or writes a single 16-bit value of global memory.
#pragma once

#include "cuda/common.cuh"
#include "cuda/ptx.cuh"
#include "geometry.h"

namespace liif_fast {

constexpr int kPatch = 4;                    // latents of a patch's side
constexpr int kLatentBytes = 128;            // of one latent in a step
constexpr int kLatentPitch = 128 + 16;       // in shared memory: neighbors start in other banks
constexpr int kVectors = kLatentBytes / 16;  // 16-byte vectors of these
constexpr int kWordsPerLane = 9;             // 4-byte words of a corner's features that one lane writes in a step
constexpr int kNine = 9;                     // neighbors that unfolding concatenates

struct PatchTask {
  GatherProblem<float> p;
  FeatStrides strides;
  int64_t queries, depth;  // queries of the whole batch; depth of a row of x
};

// Whether feat's vectors begin on 16-byte boundaries and rows of x on 4-byte boundaries.
template <class E>
bool fits_patches(const GatherProblem<float>& p, const FeatStrides& strides, const void* feat, const void* x) {
  const auto whole = [](int64_t elements) { return elements * static_cast<int64_t>(sizeof(E)) % 16 == 0; };
  return p.corners == 4 && p.feat_unfold && strides.channel == 1 && whole(p.channels) && whole(strides.batch) &&
         whole(strides.row) && whole(strides.col) && p.height < INT32_MAX && p.width < INT32_MAX &&
         reinterpret_cast<uintptr_t>(feat) % 16 == 0 && reinterpret_cast<uintptr_t>(x) % 16 == 0;
}

// Whether a query is somewhere. NaN coordinates have no latent: as in torch's CPU grid_sample, its features and its
// center are 0.
template <class T>
__device__ __forceinline__ bool is_place(const T* coord) {
  return coord[0] == coord[0] && coord[1] == coord[1];
}

// A query's neighbors along both axes, on every lane. Each lane finds one, then the lanes exchange them.
struct Corners {
  int row[2], col[2];
  float rel_row[2], rel_col[2];
};

__device__ __forceinline__ Corners find_corners(const PatchTask& task, int64_t query, int lane) {
  const int axis = lane >> 1 & 1, side = lane & 1;
  const int64_t size = axis ? task.p.width : task.p.height;
  const Neighbor<float> mine = find_neighbor(task.p.coord[2 * query + axis], 2 * side - 1, size);
  Corners found;
  const int mine_index = static_cast<int>(mine.index);
  int index[4];
  float rel[4];
#pragma unroll
  for (int other = 0; other < 4; ++other) {  // of lane ^ other
    index[other] = other ? __shfl_xor_sync(kAllLanes, mine_index, other) : mine_index;
    rel[other] = other ? __shfl_xor_sync(kAllLanes, mine.rel, other) : mine.rel;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {  // lane ^ other is (axis, i)
    const int row = (i ^ side) | axis << 1, col = (i ^ side) | (axis ^ 1) << 1;
    found.row[i] = row == 0 ? index[0] : (row == 1 ? index[1] : (row == 2 ? index[2] : index[3]));
    found.rel_row[i] = row == 0 ? rel[0] : (row == 1 ? rel[1] : (row == 2 ? rel[2] : rel[3]));
    found.col[i] = col == 0 ? index[0] : (col == 1 ? index[1] : (col == 2 ? index[2] : index[3]));
    found.rel_col[i] = col == 0 ? rel[0] : (col == 1 ? rel[1] : (col == 2 ? rel[2] : rel[3]));
  }
  const float* const coord = task.p.coord + 2 * query;
  if (!is_place(coord)) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      found.row[i] = found.col[i] = -kPatch;  // a patch outside of the map
      found.rel_row[i] = mul_rounded(coord[0], static_cast<float>(task.p.height));
      found.rel_col[i] = mul_rounded(coord[1], static_cast<float>(task.p.width));
    }
  }
  return found;
}

// Whether the four corners share a patch. Neighbors along an axis are the same latent or consecutive ones, except for
// roundings at a tie.
__device__ __forceinline__ bool corners_share_a_patch(const Corners& found) {
  return static_cast<unsigned>(found.row[1] - found.row[0]) <= 1 &&
         static_cast<unsigned>(found.col[1] - found.col[0]) <= 1;
}

// Offset of a feature in shared memory, from the corner's own latent in the patch.
template <class E>
__device__ __forceinline__ uint32_t feature_offset(int feature) {
  const int channel = feature / kNine, neighbor = feature % kNine;
  return static_cast<uint32_t>((neighbor / 3 * kPatch + neighbor % 3) * kLatentPitch +
                               channel * static_cast<int>(sizeof(E)));
}

// Copies latents (row - 1, col - 1) to (row + 2, col + 2) of a map, bytes [begin, begin + 128) of each; zeros outside.
template <class E>
__device__ __forceinline__ void load_patch(const PatchTask& task, const E* feat, int64_t batch, int row, int col,
                                           int64_t begin, int lane, unsigned char* patch) {
  constexpr int kLoads = kPatch * kPatch * kVectors / kWarp;
  uint4 vectors[kLoads];
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    const int latent = (i * kWarp + lane) / kVectors, vector = lane % kVectors;
    const int y = row - 1 + latent / kPatch, z = col - 1 + latent % kPatch;
    const int64_t byte = begin + vector * 16;
    const bool inside = y >= 0 && y < task.p.height && z >= 0 && z < task.p.width &&
                        byte < task.p.channels * static_cast<int64_t>(sizeof(E));
    vectors[i] = make_uint4(0, 0, 0, 0);
    if (inside) {
      const E* const from = feat + batch * task.strides.batch + y * task.strides.row + z * task.strides.col;
      vectors[i] = __ldg(reinterpret_cast<const uint4*>(reinterpret_cast<const unsigned char*>(from) + byte));
    }
  }
  __syncwarp();  // wait until all lanes have read the previous patch
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    const int latent = (i * kWarp + lane) / kVectors, vector = lane % kVectors;
    *reinterpret_cast<uint4*>(patch + latent * kLatentPitch + vector * 16) = vectors[i];
  }
  __syncwarp();
}

// Writes a corner's features of this step, `words` words, to `out`; from: the corner's latent in the patch.
template <class E>
__device__ __forceinline__ void write_features(const unsigned char* from, const uint32_t (&offsets)[kWordsPerLane],
                                               int words, int lane, uint32_t* out) {
#pragma unroll
  for (int i = 0; i < kWordsPerLane; ++i) {
    if (i * kWarp + lane >= words) break;
    uint32_t word;
    if constexpr (sizeof(E) == 4) {
      word = *reinterpret_cast<const uint32_t*>(from + offsets[i]);
    } else {
      const uint32_t low = *reinterpret_cast<const uint16_t*>(from + (offsets[i] & 0xffffu));
      const uint32_t high = *reinterpret_cast<const uint16_t*>(from + (offsets[i] >> 16));
      word = low | high << 16;
    }
    out[i * kWarp + lane] = word;
  }
}

// Two blocks per SM: without the bound the compiler fits more of them and spills.
template <class E>
__global__ void __launch_bounds__(kThreads, 2)
    gather_forward_patch_kernel(const __grid_constant__ PatchTask task, const E* __restrict__ feat, E* __restrict__ x,
                                float* __restrict__ area_weight) {
  constexpr int kStepChannels = kLatentBytes / sizeof(E), kPerWord = 4 / sizeof(E);
  static_assert(kStepChannels * kNine / kPerWord == kWordsPerLane * kWarp, "a step is nine words per lane");
  __shared__ uint4 patches[kWarps][kPatch * kPatch * kLatentPitch / 16];
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  unsigned char* const patch = reinterpret_cast<unsigned char*>(patches[threadIdx.x / kWarp]);
  uint32_t offsets[kWordsPerLane];
#pragma unroll
  for (int i = 0; i < kWordsPerLane; ++i) {
    const int feature = (i * kWarp + lane) * kPerWord;
    offsets[i] = feature_offset<E>(feature);
    if (sizeof(E) == 2) offsets[i] |= feature_offset<E>(feature + 1) << 16;
  }
  const GatherProblem<float>& p = task.p;
  for (int64_t query = grid_warp(); query < task.queries; query += grid_warps()) {
    const Corners found = find_corners(task, query, lane);
    const int64_t batch = query / p.queries;
    const bool together = corners_share_a_patch(found);  // otherwise a patch for each corner
    for (int64_t channel = 0; channel < p.channels; channel += kStepChannels) {
      const int64_t left = p.channels - channel;
      const int words = static_cast<int>(left < kStepChannels ? left : kStepChannels) * kNine / kPerWord;
      // One patch for all corners, or one for each.
#pragma unroll 1
      for (int first = 0; first < (together ? 1 : 4); ++first) {
        const int row = first & 2 ? found.row[1] : found.row[0], col = first & 1 ? found.col[1] : found.col[0];
        load_patch(task, feat, batch, row, col, channel * static_cast<int64_t>(sizeof(E)), lane, patch);
#pragma unroll 1
        for (int corner = first; corner < (together ? 4 : first + 1); ++corner) {
          const int down = corner & 2 ? found.row[1] - row : 0;
          const int right = corner & 1 ? found.col[1] - col : 0;
          const int latent = together ? down * kPatch + right : 0;
          uint32_t* const out = reinterpret_cast<uint32_t*>(x + (query * 4 + corner) * task.depth + channel * kNine);
          write_features<E>(patch + latent * kLatentPitch, offsets, words, lane, out);
        }
      }
    }
    if (lane < 4) {
      float weights[4];
      area_weights(found.rel_row, found.rel_col, weights);
      const float upper = lane & 1 ? weights[1] : weights[0], lower = lane & 1 ? weights[3] : weights[2];
      area_weight[query * 4 + lane] = lane & 2 ? lower : upper;
      E* const geometry = x + (query * 4 + lane) * task.depth + p.channels * kNine;
      geometry[0] = narrow<E>(lane & 2 ? found.rel_row[1] : found.rel_row[0]);
      geometry[1] = narrow<E>(lane & 1 ? found.rel_col[1] : found.rel_col[0]);
      if (p.has_cell) {
        geometry[2] = narrow<E>(mul_rounded(p.cell[2 * query], static_cast<float>(p.height)));
        geometry[3] = narrow<E>(mul_rounded(p.cell[2 * query + 1], static_cast<float>(p.width)));
      }
    }
  }
}

}  // namespace liif_fast
