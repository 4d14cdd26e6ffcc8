// The CUDA backend: launchers of its kernels in plain sizes and pointers. No CUDA and no torch header is needed to call
// them. decode/launch.h has the fused decode's.
//
// T is the dtype of geometry (float or double), Dtype that of features, predictions and MetaSR's latent map: kFloat64
// with T = double, the others with T = float. Every pointer is device memory that the caller owns, every array
// contiguous unless strides are given. A launcher puts its kernels on `stream` (a cudaStream_t of the current device),
// allocates nothing, waits for nothing, and returns nullptr or CUDA's error message.
#pragma once

#include <cstdint>

#include "gather.h"
#include "metasr.h"

namespace liif_fast {

enum class Dtype { kFloat64, kFloat32, kBFloat16, kFloat16 };

// Of feat [batch, channel, row, col], in elements. Any layout: NCHW, channels-last, slices, expanded maps.
struct FeatStrides {
  int64_t batch, channel, row, col;
};

// Strides of a contiguous map, its channels first or last.
template <class T>
FeatStrides whole_map(const GatherProblem<T>& p, bool channels_last) {
  const int64_t plane = p.height * p.width, all = p.channels * plane;
  if (channels_last) return {all, 1, p.width * p.channels, p.channels};
  return {all, plane, p.width, 1};
}

// x: [batch, queries, corners, depth] of `dtype`; area_weight: [batch, queries, corners].
template <class T>
const char* launch_gather_forward(const GatherProblem<T>& problem, Dtype dtype, const void* feat,
                                  const FeatStrides& strides, void* x, T* area_weight, void* stream);

// grads.feat: zeroed, its elements at `strides`; fastest where its channels are consecutive. With `deterministic` the
// order in which a latent's gradients are added is fixed, otherwise it is the hardware's.
template <class T>
const char* launch_gather_backward(const GatherProblem<T>& problem, Dtype dtype, const FeatStrides& strides,
                                   const GatherGrads<T>& grads, bool deterministic, void* stream);

// out: [rows, outs].
template <class T>
const char* launch_ensemble_forward(const EnsembleProblem<T>& problem, Dtype dtype, T* out, void* stream);

template <class T>
const char* launch_ensemble_backward(const EnsembleProblem<T>& problem, Dtype dtype, const EnsembleGrads<T>& grads,
                                     void* stream);

// MetaSR's folded decode.
template <class T>
const char* launch_metasr_forward(const MetasrProblem<T>& problem, Dtype dtype, void* stream);

// The latent of every query of the batch, counted through all maps: latents [batch * queries].
template <class T>
const char* launch_metasr_latents(const MetasrProblem<T>& problem, int64_t* latents, void* stream);

// Numbers of T in the backward's workspace.
template <class T>
int64_t metasr_workspace(const MetasrProblem<T>& problem);

// The queries sorted by latent: those of latent i are order[starts[i]] to order[starts[i + 1]].
struct MetasrOrder {
  const int64_t *order, *starts;  // null: no order
};

// All gradients of the decode. Without an order, grads.latent_map must be zeroed, and gradients are added to it in the
// hardware's order. With an order, grads.latent_map is written, and its sums follow that order.
template <class T>
const char* launch_metasr_backward(const MetasrProblem<T>& problem, Dtype dtype, const MetasrGrads<T>& grads,
                                   const MetasrOrder& sorted, T* workspace, void* stream);

// A 3x3 convolution with zero padding of a float32 map, its operands rounded to 16 bits. Transposed: the gradient of
// the map of such a convolution, from the gradient of its result.
struct ConvolutionProblem {
  int64_t batch, height, width, channels, outs;  // channels of map and out: multiples of 4
  const float* map;                              // [batch, height, width, channels], aligned to 16 bytes
  const float* kernels;                          // [outs, channels, 3, 3]; transposed: [channels, outs, 3, 3]
  bool transposed, in_bfloat16;                  // bfloat16 operands, not float16
  float* out;                                    // [batch, height, width, outs], aligned to 16 bytes
};
constexpr int64_t kMaxConvolutionChannels = 16384;

// workspace: of so many bytes, aligned to 16.
int64_t convolution_workspace(const ConvolutionProblem& problem);
const char* launch_convolution(const ConvolutionProblem& problem, void* workspace, void* stream);

// The gradient of its kernels. latents and grads are 16-bit arrays [rows, channels] of maps with a border of zeros,
// pixel after pixel, aligned to 16 bytes, their channels padded with zeros to the steps. Row i of grads belongs to the
// latents of rows i + row_pixels * r + c, with r and c from 0 to 2.
constexpr int kLatentStep = 64, kGradStep = 256, kPixelStep = 32;
struct KernelGradsProblem {
  int64_t pixels, row_pixels;  // rows of grads, a multiple of kPixelStep; pixels of a map's row and its border
  int latent_channels, grad_channels;
  int64_t channels, outs;  // without padding; outs is a multiple of 4
  bool in_bfloat16;        // latents and grads, not float16
  const void *latents, *grads;
  float* out;  // [outs, channels, 3, 3]
};
int64_t kernel_grads_workspace(const KernelGradsProblem& problem);
const char* launch_kernel_grads(const KernelGradsProblem& problem, void* workspace, void* stream);

}  // namespace liif_fast
