// The CPU backend: the ops on plain problems, on all of PyTorch's threads. These are the functions that csrc/bindings
// calls.
#pragma once

#include "convolution.h"
#include "decode.h"
#include "gather.h"
#include "metasr.h"

namespace liif_fast {

// E is the dtype of feat and x: T itself, or bfloat16 or float16 with T = float.
template <class T, class E>
void gather_forward(const GatherProblem<T>& p, const E* feat, E* x, T* area_weight);
template <class T>
void gather_backward(const GatherProblem<T>& p, const GatherGrads<T>& grads);

template <class T>
void ensemble_forward(const EnsembleProblem<T>& p, T* out);  // out: [rows, outs]
template <class T>
void ensemble_backward(const EnsembleProblem<T>& p, const EnsembleGrads<T>& grads);

// bf16: whether products have bfloat16 operands, which needs bf16_kernels(); ignored in double. bf16_map: whether the
// latent map is bfloat16, which needs bf16. The backward takes a latent map of T, and zeroed grads. saved: a slab of
// cpu/slabs.h that the forward fills and the backward reads, or null.
template <class T>
void decode_forward(const DecodeProblem<T>& p, bool bf16, bool bf16_map, char* saved);
template <class T>
void decode_backward(const DecodeProblem<T>& p, const DecodeGrads<T>& grads, bool bf16, char* saved);

// The bytes that the forward saves of a tile, and the rows of a tile. Of p it reads only the layers' widths.
struct SavedLayout {
  int64_t tile_bytes, tile_rows;
};
template <class T>
SavedLayout saved_layout(const DecodeProblem<T>& p, bool bf16);

template <class T>
void metasr_forward(const MetasrProblem<T>& p);
template <class T>
void metasr_backward(const MetasrProblem<T>& p, const MetasrGrads<T>& grads);  // grads zeroed

template <class T>
void kernel_grads(const ConvolutionGradsProblem<T>& p);  // grad_kernels zeroed

}  // namespace liif_fast
