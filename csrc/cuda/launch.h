// Launchers of the CUDA kernels in plain sizes and pointers; no CUDA and no torch header is needed to call them.
//
// T is the dtype of geometry (float or double), Dtype that of features and predictions: kFloat64 with T = double, the
// others with T = float. Every pointer is device memory that the caller owns, every array contiguous unless strides are
// given. A launcher puts its kernels on `stream` (a cudaStream_t of the current device), allocates nothing, waits for
// nothing, and returns nullptr or CUDA's own sentence about what went wrong.
#pragma once

#include <cstdint>

#include "decode.h"
#include "gather.h"

namespace liif_fast {

enum class Dtype { kFloat64, kFloat32, kBFloat16, kFloat16 };

// Of feat [batch, channel, row, col], in elements. Any layout: NCHW, channels-last, slices, expanded maps.
struct FeatStrides {
  int64_t batch, channel, row, col;
};

// Of a whole map in memory of its own, its channels first or last.
inline FeatStrides whole_map(int64_t channels, int64_t height, int64_t width, bool channels_last) {
  const int64_t plane = height * width, all = channels * plane;
  if (channels_last) return {all, 1, width * channels, channels};
  return {all, plane, width, 1};
}

// x: [batch, queries, corners, depth] of `dtype`; area_weight: [batch, queries, corners].
template <class T>
const char* launch_gather_forward(const GatherProblem<T>& problem, Dtype dtype, const void* feat,
                                  const FeatStrides& strides, void* x, T* area_weight, void* stream);

// grad_x: of `dtype`, in x's shape; grad_feat: zeroed, its elements at `strides`, fastest where its channels are
// consecutive; grad_cell may be null without cell. The order in which a latent's gradients are added is fixed with
// `deterministic`, otherwise the hardware's.
template <class T>
const char* launch_gather_backward(const GatherProblem<T>& problem, Dtype dtype, const void* grad_x,
                                   const T* grad_area_weight, const FeatStrides& strides, T* grad_feat, T* grad_coord,
                                   T* grad_cell, bool deterministic, void* stream);

// pred: [rows, corners, outs] of `dtype`; area_weight: [rows, corners]; out: [rows, outs].
template <class T>
const char* launch_ensemble_forward(Dtype dtype, const void* pred, const T* area_weight, int64_t rows, int64_t corners,
                                    int64_t outs, T* out, void* stream);

// grad_pred in pred's shape, grad_area_weight in area_weight's, both in T.
template <class T>
const char* launch_ensemble_backward(Dtype dtype, const T* grad_out, const void* pred, const T* area_weight,
                                     int64_t rows, int64_t corners, int64_t outs, T* grad_pred, T* grad_area_weight,
                                     void* stream);

// MetaSR's folded decode. latent_map: of `dtype`, in the place of problem.latent_map; results in T.
template <class T>
const char* launch_metasr_forward(const MetasrProblem<T>& problem, Dtype dtype, const void* latent_map, void* stream);

// The latent of every query of the batch, counted through all maps: latents [batch * queries].
template <class T>
const char* launch_metasr_latents(const MetasrProblem<T>& problem, int64_t* latents, void* stream);

// Numbers of T that the backward needs beside its results.
template <class T>
int64_t metasr_workspace(const MetasrProblem<T>& problem);

// All gradients of the decode. Without `order`, grads.latent_map must be zeroed and is added to in the hardware's
// order. With it, in the order given: the queries sorted by latent, those of latent i at starts[i] to starts[i + 1];
// then grads.latent_map is written.
template <class T>
const char* launch_metasr_backward(const MetasrProblem<T>& problem, Dtype dtype, const void* latent_map,
                                   const MetasrGrads<T>& grads, const int64_t* order, const int64_t* starts,
                                   T* workspace, void* stream);

}  // namespace liif_fast
