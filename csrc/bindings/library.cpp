// The library of ops: the schemas that CPU and CUDA share, and the choice of the processor's instruction set. cpu_*.cpp
// and cuda_*.cpp implement the ops.
#include <memory>
#include <mutex>
#include <numeric>
#include <set>
#include <string>

#include "bindings/common.h"
#include "bindings/registry.h"
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

// The ops that take no tensors, and the schemas that CPU and CUDA share.
void register_shared(Registry& ops) {
  ops.def("gather(Tensor feat, Tensor coord, Tensor? cell, bool feat_unfold, bool local_ensemble) -> (Tensor, Tensor)");
  ops.def(
      "gather_backward(Tensor grad_x, Tensor grad_area_weight, Tensor coord, int channels, int height, int width, "
      "bool has_cell, bool feat_unfold, bool local_ensemble) -> (Tensor, Tensor, Tensor)");
  ops.def("ensemble(Tensor pred, Tensor area_weight) -> Tensor");
  ops.def("ensemble_backward(Tensor grad_out, Tensor pred, Tensor area_weight) -> (Tensor, Tensor)");
  ops.def(
      "decode(Tensor latent_map, Tensor? coord, Tensor? cell, Tensor weight_geometry, Tensor[] weights, "
      "Tensor[] biases, int[] grid, float[] grid_cell, bool local_ensemble, Tensor? query_term, bool bf16, "
      "Tensor(a!) saved, "
      "bool skips_corners) -> Tensor");
  ops.def(
      "decode_backward(Tensor grad_out, Tensor latent_map, Tensor? coord, Tensor? cell, Tensor weight_geometry, "
      "Tensor[] weights, Tensor[] biases, int[] grid, float[] grid_cell, bool local_ensemble, Tensor? query_term, "
      "bool bf16, "
      "Tensor saved, bool coord_grad) -> Tensor[]");
  ops.def(
      "metasr_query(Tensor latent_map, Tensor coord, Tensor cell, Tensor weight, Tensor bias, int[] region) -> Tensor");
  ops.def(
      "metasr_query_backward(Tensor grad_out, Tensor latent_map, Tensor coord, Tensor cell, Tensor weight, "
      "Tensor bias, int[] region) -> Tensor[]");
  ops.def("cpu_isa() -> str");
  ops.def("cpu_has_bf16() -> bool");
  ops.def("cpu_select_isa(str name) -> bool");
  ops.def("cpu_multiply_add_loop(str dtype, int repetitions) -> float");
  ops.impl("CompositeExplicitAutograd", "cpu_isa", TORCH_BOX(&cpu_isa));
  ops.impl("CompositeExplicitAutograd", "cpu_has_bf16", TORCH_BOX(&cpu_has_bf16));
  ops.impl("CompositeExplicitAutograd", "cpu_select_isa", TORCH_BOX(&cpu_select_isa));
  ops.impl("CompositeExplicitAutograd", "cpu_multiply_add_loop", TORCH_BOX(&cpu_multiply_add_loop));
}

}  // namespace

// Registers the ops under torch.ops.<name_space>; returns null, or one sentence why that is impossible. Registered ops
// stay until the process ends. A second call with the same name changes nothing.
extern "C" __attribute__((visibility("default"))) const char* liif_fast_register(const char* name_space) {
  static std::mutex mutex;
  static std::set<std::string> registered;
  static std::string error;
  const std::lock_guard<std::mutex> lock(mutex);
  if (registered.count(name_space)) return nullptr;
  try {
    auto ops = std::make_unique<Registry>(name_space);
    register_shared(*ops);
    register_cpu_gather(*ops);
    register_cpu_decode(*ops);
#ifdef LIIF_FAST_WITH_CUDA
    register_cuda_gather(*ops);
    register_cuda_decode(*ops);
    register_cuda_metasr(*ops);
    register_cuda_convolution(*ops);
#endif
    registered.insert(name_space);
    (void)ops.release();  // never deleted
    return nullptr;
  } catch (const std::exception& caught) {
    error = caught.what();
    return error.c_str();
  }
}

}  // namespace liif_fast
