// The table of one instruction set's kernels, and the choice at run time.
#pragma once

#include "decode.h"

namespace liif_fast {

template <class T>
struct MatrixKernels {
  int tile_rows;

  size_t (*packed_bytes)(const QueryProblem<T>&, bool gradients);
  void (*pack)(const QueryProblem<T>&, bool gradients, char* packed);
  size_t (*forward_scratch_bytes)(const QueryProblem<T>&);
  void (*forward_tiles)(const QueryProblem<T>&, char* packed, int64_t begin, int64_t end, char* scratch);

  size_t (*backward_scratch_bytes)(const QueryProblem<T>&);
  size_t (*sums_bytes)(const QueryProblem<T>&);
  void (*backward_tiles)(const QueryProblem<T>&, const QueryGrads<T>&, char* packed, int64_t begin, int64_t end,
                         char* scratch, char* sums, int64_t step_begin, T* latent_rows, int64_t* row_latent);
  void (*scatter_rows)(const T* latent_rows, const int64_t* row_latent, int64_t count, int64_t width, int64_t owner,
                       int64_t owners, T* grad_latent_map);
  void (*add_sums)(const QueryProblem<T>&, char* sums, const QueryGrads<T>&);

  size_t (*metasr_scratch_bytes)(const MetasrProblem<T>&);
  void (*metasr_forward)(const MetasrProblem<T>&, int64_t begin, int64_t end, char* scratch);
  void (*metasr_backward)(const MetasrProblem<T>&, const MetasrGrads<T>&, int64_t begin, int64_t end, char* scratch);
  void (*metasr_add_sums)(const MetasrProblem<T>&, char* scratch, const MetasrGrads<T>&);
  void (*metasr_scatter)(const MetasrProblem<T>&, const MetasrGrads<T>&, int64_t owner, int64_t owners, char* scratch);

  double (*multiply_add_loop)(int64_t repetitions);  // registers only; returns the floating point operations done
};

// The decode with bfloat16 operands, float everything else: what is missing here, MatrixKernels<float> does.
struct Bf16Kernels {
  size_t (*packed_bytes)(const QueryProblem<float>&, bool gradients);
  void (*pack)(const QueryProblem<float>&, bool gradients, char* packed);
  size_t (*forward_scratch_bytes)(const QueryProblem<float>&);
  void (*forward_tiles)(const QueryProblem<float>&, char* packed, int64_t begin, int64_t end, char* scratch);
  void (*forward_tiles_bf16_map)(const QueryProblem<float>&, char* packed, int64_t begin, int64_t end, char* scratch);
  size_t (*backward_scratch_bytes)(const QueryProblem<float>&);
  void (*backward_tiles)(const QueryProblem<float>&, const QueryGrads<float>&, char* packed, int64_t begin, int64_t end,
                         char* scratch, char* sums, int64_t step_begin, float* latent_rows, int64_t* row_latent);
  double (*multiply_add_loop)(int64_t repetitions);
};

struct Kernels {
  const char* name;
  MatrixKernels<float> single_kernels;
  MatrixKernels<double> double_kernels;
};

const Kernels& portable_kernels();
#if defined(__x86_64__)
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
const Bf16Kernels& avx512_bf16_kernels();
#endif

// The kernels that select_kernels chose, else those of the largest instruction set of this processor that
// LIIF_FAST_CPU_ISA allows. Throws std::runtime_error where this processor cannot run the value of the variable.
const Kernels& kernels();
const Bf16Kernels* bf16_kernels();  // null where the processor cannot

// "auto", "avx512", "avx2" or "portable": for tests and benchmarks. False where the processor or LIIF_FAST_CPU_ISA does
// not allow it.
bool select_kernels(const char* name);

}  // namespace liif_fast
