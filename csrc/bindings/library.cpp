// The library of ops: the schemas that CPU and CUDA share, and the choice of the processor's instruction set. cpu_*.cpp
// and cuda_*.cpp implement the ops.
#include <numeric>
#include <string>

#include "bindings/common.h"
#include "cpu/dispatch.h"
#include "cpu/parallel.h"

namespace liif_fast {
namespace {

std::string cpu_isa() { return std::string(kernels().name) + (bf16_kernels() ? "+bf16" : ""); }
bool cpu_has_bf16() { return bf16_kernels() != nullptr; }
bool cpu_select_isa(std::string name) { return select_kernels(name.c_str()); }

// Runs the register-only multiply-add loop in every thread; returns the floating point operations of all of them. The
// caller takes the time.
double cpu_multiply_add_loop(std::string dtype, int64_t repetitions) {
  STD_TORCH_CHECK(dtype != "bfloat16" || bf16_kernels(), "this processor has no AVX-512-BF16");
  const auto loop = dtype == "bfloat16"  ? bf16_kernels()->multiply_add_loop
                    : dtype == "float64" ? kernels().double_kernels.multiply_add_loop
                                         : kernels().float_kernels.multiply_add_loop;
  const int64_t threads = thread_count();
  std::vector<double> operations(static_cast<size_t>(threads));
  parallel_shards(threads, threads,
                  [&](int64_t shard, int64_t, int64_t) { operations[static_cast<size_t>(shard)] = loop(repetitions); });
  return std::accumulate(operations.begin(), operations.end(), 0.0);
}

}  // namespace
}  // namespace liif_fast

STABLE_TORCH_LIBRARY(liif_fast_C, m) {
  m.def("gather(Tensor feat, Tensor coord, Tensor? cell, bool feat_unfold, bool local_ensemble) -> (Tensor, Tensor)");
  m.def(
      "gather_backward(Tensor grad_x, Tensor grad_area_weight, Tensor coord, int channels, int height, int width, "
      "bool has_cell, bool feat_unfold, bool local_ensemble) -> (Tensor, Tensor, Tensor)");
  m.def("ensemble(Tensor pred, Tensor area_weight) -> Tensor");
  m.def("ensemble_backward(Tensor grad_out, Tensor pred, Tensor area_weight) -> (Tensor, Tensor)");
  m.def(
      "decode(Tensor latent_map, Tensor? coord, Tensor? cell, Tensor weight_geometry, Tensor[] weights, "
      "Tensor[] biases, int[] grid, float[] grid_cell, bool local_ensemble, bool bf16) -> Tensor");
  m.def(
      "decode_backward(Tensor grad_out, Tensor latent_map, Tensor? coord, Tensor? cell, Tensor weight_geometry, "
      "Tensor[] weights, Tensor[] biases, int[] grid, float[] grid_cell, bool local_ensemble, bool bf16) -> Tensor[]");
  m.def(
      "metasr_query(Tensor latent_map, Tensor coord, Tensor cell, Tensor weight, Tensor bias, int[] region) -> Tensor");
  m.def(
      "metasr_query_backward(Tensor grad_out, Tensor latent_map, Tensor coord, Tensor cell, Tensor weight, "
      "Tensor bias, int[] region) -> Tensor[]");
  m.def("cpu_isa() -> str");
  m.def("cpu_has_bf16() -> bool");
  m.def("cpu_select_isa(str name) -> bool");
  m.def("cpu_multiply_add_loop(str dtype, int repetitions) -> float");
}

STABLE_TORCH_LIBRARY_IMPL(liif_fast_C, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&liif_fast::cpu_isa));
  m.impl("cpu_has_bf16", TORCH_BOX(&liif_fast::cpu_has_bf16));
  m.impl("cpu_select_isa", TORCH_BOX(&liif_fast::cpu_select_isa));
  m.impl("cpu_multiply_add_loop", TORCH_BOX(&liif_fast::cpu_multiply_add_loop));
}
