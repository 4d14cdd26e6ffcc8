// The table of one instruction set's kernels, and the choice of a table at run time.
#pragma once

#include "convolution.h"
#include "decode.h"
#include "metasr.h"

namespace liif_fast {

// The activations that the forward keeps for the backward: those of the first `tiles` tiles, one after another. The
// backward computes the others again.
struct SavedActivations {
  char* data;
  int64_t tiles, tile_bytes;
  char* tile(int64_t index) const { return index < tiles ? data + index * tile_bytes : nullptr; }
};

// One thread's tiles [begin, end) of a chunk of the decode's backward, and its buffers.
template <class T>
struct BackwardTiles {
  int64_t begin, end, chunk_begin;  // chunk_begin: the chunk's first tile
  char *packed, *scratch, *sums;
  T* latent_rows;       // gradients of the rows' latents, [rows of the chunk, width]
  int64_t* row_latent;  // the latent of each row, -1: no such row
};

// One thread's tiles [begin, end) of the decode's forward.
template <class T>
using ForwardTiles = void (*)(const DecodeProblem<T>&, char* packed, int64_t begin, int64_t end, char* scratch,
                              const SavedActivations&);

// The decode with operands of one dtype.
template <class T>
struct DecodeKernels {
  size_t (*packed_bytes)(const DecodeProblem<T>&, bool gradients);
  void (*pack)(const DecodeProblem<T>&, bool gradients, char* packed);
  size_t (*forward_scratch_bytes)(const DecodeProblem<T>&);
  ForwardTiles<T> forward_tiles;
  size_t (*saved_tile_bytes)(const DecodeProblem<T>&);
  size_t (*backward_scratch_bytes)(const DecodeProblem<T>&);
  void (*backward_tiles)(const DecodeProblem<T>&, const DecodeGrads<T>&, const BackwardTiles<T>&,
                         const SavedActivations&);
  double (*multiply_add_loop)(int64_t repetitions);  // registers only; returns the floating point operations done
};

template <class T>
struct MatrixKernels : DecodeKernels<T> {
  int tile_rows;

  size_t (*sums_bytes)(const DecodeProblem<T>&);
  void (*scatter_rows)(const T* latent_rows, const int64_t* row_latent, int64_t count, int64_t width, int64_t owner,
                       int64_t owners, T* grad_latent_map);
  void (*add_sums)(const DecodeProblem<T>&, char* sums, const DecodeGrads<T>&);

  size_t (*metasr_scratch_bytes)(const MetasrProblem<T>&);
  void (*metasr_forward)(const MetasrProblem<T>&, int64_t begin, int64_t end, char* scratch);
  void (*metasr_backward)(const MetasrProblem<T>&, const MetasrGrads<T>&, int64_t begin, int64_t end, char* scratch);
  void (*metasr_add_sums)(const MetasrProblem<T>&, char* scratch, const MetasrGrads<T>&);
  void (*metasr_scatter)(const MetasrProblem<T>&, const MetasrGrads<T>&, int64_t owner, int64_t owners, char* scratch);

  size_t (*kernel_grads_scratch_bytes)(const ConvolutionGradsProblem<T>&);
  void (*kernel_grads_rows)(const ConvolutionGradsProblem<T>&, int64_t begin, int64_t end, char* scratch);
  void (*add_kernel_grads)(const ConvolutionGradsProblem<T>&, char* scratch);
};

// The decode with bfloat16 operands; everything else is float. MatrixKernels<float> has the functions that both share.
struct Bf16Kernels : DecodeKernels<float> {
  ForwardTiles<float> forward_tiles_bf16_map;
};

struct Kernels {
  const char* name;
  MatrixKernels<float> float_kernels;
  MatrixKernels<double> double_kernels;
};

const Kernels& portable_kernels();
#if defined(__x86_64__)
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
const Bf16Kernels& avx512_bf16_kernels();
#elif defined(__aarch64__)
const Kernels& neon_kernels();
const Bf16Kernels& neon_bf16_kernels();
#endif

// The kernels that select_kernels chose, else those of the largest instruction set of this processor that
// LIIF_FAST_CPU_ISA allows. Throws std::runtime_error if the variable names no set of this processor.
const Kernels& kernels();
// Null where the processor does not multiply bfloat16, or where another set than AVX-512 or NEON is chosen.
const Bf16Kernels* bf16_kernels();

// "auto", "avx512", "avx2", "neon" or "portable": for tests and benchmarks. False where the processor or
// LIIF_FAST_CPU_ISA does not allow it.
bool select_kernels(const char* name);

}  // namespace liif_fast
