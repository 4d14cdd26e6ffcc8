// The CPU's ops on plain problems; multi-threaded.
#pragma once

#include "decode.h"
#include "gather.h"

namespace liif_fast {

// E is the dtype of feat and x: T itself, or bfloat16 or half with T = float.
template <class T, class E>
void gather_forward(const GatherProblem<T>& p, const E* feat, E* x, T* area_weight);
template <class T>
void gather_backward(const GatherProblem<T>& p, const GatherGrads<T>& grads);

// pred [rows, corners, outs], area_weight [rows, corners] -> out [rows, outs]
template <class T>
void ensemble_forward(const T* pred, const T* area_weight, int64_t rows, int64_t corners, int64_t outs, T* out);
template <class T>
void ensemble_backward(const T* grad_out, const T* pred, const T* area_weight, int64_t rows, int64_t corners,
                       int64_t outs, T* grad_pred, T* grad_area_weight);

template <class T>
void query_forward(const QueryProblem<T>& p);
template <class T>
void query_backward(const QueryProblem<T>& p, const QueryGrads<T>& grads);  // grads zeroed

// The same with bfloat16 operands; needs bf16_kernels(). The backward takes a float latent map.
void query_forward_bf16(const QueryProblem<float>& p, bool bf16_map);
void query_backward_bf16(const QueryProblem<float>& p, const QueryGrads<float>& grads);

template <class T>
void metasr_query_forward(const MetasrProblem<T>& p);
template <class T>
void metasr_query_backward(const MetasrProblem<T>& p, const MetasrGrads<T>& grads);  // grads zeroed

}  // namespace liif_fast
