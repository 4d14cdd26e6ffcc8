// gather's fast backward, in the cases of patch_forward.cuh. The gradients that a query's corners send to 36 neighbors
// belong to 4x4 latents. A warp adds them up in registers, one channel per lane, then adds each latent's sum to memory
// once, four channels per instruction. Adding one value after the other would take nine times as many additions.
#pragma once

#include "cuda/gather/patch_forward.cuh"

namespace liif_fast {

constexpr int kSums = kPatch * kPatch;
constexpr int kSumsPitch = kWarp + 4;  // floats: a latent's sums begin on a 16-byte boundary

// Whether grad_feat, [batch, row, col, channel], takes whole float4 and rows of grad_x begin on 4-byte boundaries.
template <class E>
bool fits_patches_backward(const GatherProblem<float>& p, const FeatStrides& strides, const void* grad_x,
                           const float* grad_feat) {
  return p.corners == 4 && p.feat_unfold && strides.channel == 1 && p.channels % 4 == 0 && p.height < INT32_MAX &&
         p.width < INT32_MAX && reinterpret_cast<uintptr_t>(grad_feat) % 16 == 0 &&
         reinterpret_cast<uintptr_t>(grad_x) % 4 == 0;
}

// Adds a channel's nine gradients at `from` to the sums of the latents around the corner's own latent, which is at
// (down, right) in the patch.
template <int kDown, int kRight, class E>
__device__ __forceinline__ void add_neighbors(const E* from, float (&sums)[kSums]) {
#pragma unroll
  for (int k = 0; k < kNine; ++k) sums[(kDown + k / 3) * kPatch + kRight + k % 3] += widen(from[k]);
}

// The latents from (row - 1, col - 1) to (row - 1 + rows, col - 1 + cols) of a map, channels from `channel` on.
struct PatchSpan {
  int64_t batch;
  int row, col, rows, cols;
  int64_t channel;
  int channels;
};

// Adds sums, of the lane's channel, to the latents of the span. staged: the warp's shared memory.
__device__ __forceinline__ void add_patch(const PatchTask& task, float* grad_feat, const PatchSpan& span, int lane,
                                          const float (&sums)[kSums], float4* staged) {
  float* const floats = reinterpret_cast<float*>(staged);
  constexpr int kLatentVectors = kWarp / 4;
#pragma unroll
  for (int latent = 0; latent < kSums; ++latent) floats[latent * kSumsPitch + lane] = sums[latent];
  __syncwarp();
#pragma unroll
  for (int i = 0; i < kSums * kLatentVectors / kWarp; ++i) {
    const int latent = (i * kWarp + lane) / kLatentVectors, first = lane % kLatentVectors * 4;
    const int down = latent / kPatch, right = latent % kPatch;
    const int y = span.row - 1 + down, z = span.col - 1 + right;
    if (down < span.rows && right < span.cols && y >= 0 && y < task.p.height && z >= 0 && z < task.p.width &&
        first < span.channels) {
      float* const to =
          grad_feat + span.batch * task.strides.batch + y * task.strides.row + z * task.strides.col + span.channel;
      reduce_add(to + first, staged[(latent * kSumsPitch + first) / 4]);
    }
  }
  __syncwarp();
}

// Copies the lane's part of a corner's gradients of this step, in 4-byte words, to shared memory.
__device__ __forceinline__ void stage_words(const uint32_t* from, int words, int lane, uint32_t* staged) {
  __syncwarp();  // wait until all lanes have read the previous words
#pragma unroll
  for (int i = 0; i < kWordsPerLane; ++i)
    if (i * kWarp + lane < words) staged[i * kWarp + lane] = __ldg(from + i * kWarp + lane);
  __syncwarp();
}

template <class E>
__global__ void __launch_bounds__(kThreads, 2)
    gather_backward_patch_kernel(const __grid_constant__ PatchTask task, const E* __restrict__ grad_x,
                                 float* __restrict__ grad_feat) {
  __shared__ uint32_t gradients[kWarps][kWarp * kNine * sizeof(E) / 4];
  __shared__ float4 latents[kWarps][kSums * kSumsPitch / 4];
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  uint32_t* const staged = gradients[threadIdx.x / kWarp];
  const E* const mine = reinterpret_cast<const E*>(staged) + lane * kNine;
  const GatherProblem<float>& p = task.p;
  for (int64_t query = grid_warp(); query < task.queries; query += grid_warps()) {
    const Corners found = find_corners(task, query, lane);
    const int64_t batch = query / p.queries;
    const bool together = corners_share_a_patch(found);
    for (int64_t channel = 0; channel < p.channels; channel += kWarp) {
      const int channels = static_cast<int>(p.channels - channel < kWarp ? p.channels - channel : kWarp);
      const int words = channels * kNine * static_cast<int>(sizeof(E)) / 4;
      // One patch for all corners, or one for each.
#pragma unroll 1
      for (int first = 0; first < (together ? 1 : 4); ++first) {
        const int row = first & 2 ? found.row[1] : found.row[0], col = first & 1 ? found.col[1] : found.col[0];
        float sums[kSums] = {};
        int last_down = 0, last_right = 0;
#pragma unroll 1
        for (int corner = first; corner < (together ? 4 : first + 1); ++corner) {
          const E* const from = grad_x + (query * 4 + corner) * task.depth + channel * kNine;
          stage_words(reinterpret_cast<const uint32_t*>(from), words, lane, staged);
          const int down = together && corner & 2 ? found.row[1] - row : 0;
          const int right = together && corner & 1 ? found.col[1] - col : 0;
          last_down |= down;
          last_right |= right;
          if (lane >= channels) continue;
          if (down)
            right ? add_neighbors<1, 1>(mine, sums) : add_neighbors<1, 0>(mine, sums);
          else
            right ? add_neighbors<0, 1>(mine, sums) : add_neighbors<0, 0>(mine, sums);
        }
        add_patch(task, grad_feat, {batch, row, col, 3 + last_down, 3 + last_right, channel, channels}, lane, sums,
                  latents[threadIdx.x / kWarp]);
      }
    }
  }
}

}  // namespace liif_fast
