// The extension's face to PyTorch, through the LibTorch stable ABI: memory-safety checks, allocation, dtype switch.
// The schemas of all CPU ops, gather, ensemble and the processor; bindings_query.cpp has the fused decodes.
// liif_fast/ops/backends/cpu.py is the only caller; messages for users are in liif_fast/ops/validation.py.
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <numeric>
#include <string>

#include "bindings/cpu.h"
#include "cpu/kernels.h"
#include "cpu/ops.h"
#include "cpu/parallel.h"

namespace liif_fast {
namespace {

// ------------------------------------------------------------------------------------------------- gather and ensemble

template <class T>
GatherProblem<T> gather_problem(const Tensor& coord, int64_t channels, int64_t height, int64_t width, bool has_cell,
                                bool feat_unfold, bool local_ensemble) {
  GatherProblem<T> p{};
  STD_TORCH_CHECK(coord.dim() == 3, "coord must have 3 dimensions");
  p.batch = coord.size(0);
  p.queries = coord.size(1);
  p.channels = channels;
  p.height = height;
  p.width = width;
  STD_TORCH_CHECK(channels > 0 && height > 0 && width > 0, "feat must not be empty");
  p.corners = local_ensemble ? 4 : 1;
  p.feat_unfold = feat_unfold;
  p.has_cell = has_cell;
  p.coord = checked<T>(coord, "coord", {p.batch, p.queries, 2});
  return p;
}

template <class T, class E>
std::tuple<Tensor, Tensor> run_gather(const Tensor& feat, const Tensor& coord, const MaybeTensor& cell,
                                      bool feat_unfold, bool local_ensemble) {
  GatherProblem<T> p =
      gather_problem<T>(coord, feat.size(1), feat.size(2), feat.size(3), cell.has_value(), feat_unfold, local_ensemble);
  STD_TORCH_CHECK(feat.is_cpu() && feat.is_contiguous() && feat.size(0) == p.batch,
                  "feat must be contiguous, on the CPU, of coord's batch");
  p.cell = checked<T>(cell, "cell", {p.batch, p.queries, 2});
  Tensor x = torch::stable::new_empty(feat, {p.batch, p.queries, p.corners, p.depth()});
  Tensor area_weight = empty<T>(feat, {p.batch, p.queries, p.corners});
  gather_forward(p, static_cast<const E*>(feat.const_data_ptr()), data<E>(x), data<T>(area_weight));
  return {x, area_weight};
}

std::tuple<Tensor, Tensor> gather(const Tensor& feat, const Tensor& coord, const MaybeTensor& cell, bool feat_unfold,
                                  bool local_ensemble) {
  STD_TORCH_CHECK(feat.dim() == 4, "feat must have 4 dimensions");
  switch (feat.scalar_type()) {
    case ScalarType::Double:
      return run_gather<double, double>(feat, coord, cell, feat_unfold, local_ensemble);
    case ScalarType::Float:
      return run_gather<float, float>(feat, coord, cell, feat_unfold, local_ensemble);
    case ScalarType::BFloat16:
      return run_gather<float, torch::headeronly::BFloat16>(feat, coord, cell, feat_unfold, local_ensemble);
    case ScalarType::Half:
      return run_gather<float, torch::headeronly::Half>(feat, coord, cell, feat_unfold, local_ensemble);
    default:
      STD_TORCH_CHECK(false, "feat must be float64, float32, bfloat16 or float16");
  }
}

template <class T>
std::tuple<Tensor, Tensor, Tensor> run_gather_backward(const Tensor& grad_x, const Tensor& grad_area_weight,
                                                       const Tensor& coord, int64_t channels, int64_t height,
                                                       int64_t width, bool has_cell, bool feat_unfold,
                                                       bool local_ensemble) {
  const GatherProblem<T> p = gather_problem<T>(coord, channels, height, width, has_cell, feat_unfold, local_ensemble);
  GatherGrads<T> grads{};
  grads.x = checked<T>(grad_x, "grad_x", {p.batch, p.queries, p.corners, p.depth()});
  grads.area_weight = checked<T>(grad_area_weight, "grad_area_weight", {p.batch, p.queries, p.corners});
  Tensor grad_feat = zeros<T>(coord, {p.batch, channels, height, width});
  Tensor grad_coord = empty<T>(coord, {p.batch, p.queries, 2});
  Tensor grad_cell = has_cell ? empty<T>(coord, {p.batch, p.queries, 2}) : empty<T>(coord, {0});
  grads.feat = data<T>(grad_feat);
  grads.coord = data<T>(grad_coord);
  grads.cell = has_cell ? data<T>(grad_cell) : nullptr;
  gather_backward(p, grads);
  return {grad_feat, grad_coord, grad_cell};
}

std::tuple<Tensor, Tensor, Tensor> gather_backward_op(const Tensor& grad_x, const Tensor& grad_area_weight,
                                                      const Tensor& coord, int64_t channels, int64_t height,
                                                      int64_t width, bool has_cell, bool feat_unfold,
                                                      bool local_ensemble) {
  const auto run = coord.scalar_type() == ScalarType::Double ? run_gather_backward<double> : run_gather_backward<float>;
  return run(grad_x, grad_area_weight, coord, channels, height, width, has_cell, feat_unfold, local_ensemble);
}

template <class T>
Tensor run_ensemble(const Tensor& pred, const Tensor& area_weight) {
  const Sizes sizes{pred.size(0), pred.size(1), pred.size(2), pred.size(3)};
  const T* values = checked<T>(pred, "pred", sizes);
  const T* weights = checked<T>(area_weight, "area_weight", {sizes[0], sizes[1], sizes[2]});
  Tensor out = empty<T>(pred, {sizes[0], sizes[1], sizes[3]});
  ensemble_forward(values, weights, sizes[0] * sizes[1], sizes[2], sizes[3], data<T>(out));
  return out;
}

Tensor ensemble(const Tensor& pred, const Tensor& area_weight) {
  STD_TORCH_CHECK(pred.dim() == 4, "pred must have 4 dimensions");
  return pred.scalar_type() == ScalarType::Double ? run_ensemble<double>(pred, area_weight)
                                                  : run_ensemble<float>(pred, area_weight);
}

template <class T>
std::tuple<Tensor, Tensor> run_ensemble_backward(const Tensor& grad_out, const Tensor& pred,
                                                 const Tensor& area_weight) {
  const Sizes sizes{pred.size(0), pred.size(1), pred.size(2), pred.size(3)}, corners{sizes[0], sizes[1], sizes[2]};
  const T* grads = checked<T>(grad_out, "grad_out", {sizes[0], sizes[1], sizes[3]});
  const T* values = checked<T>(pred, "pred", sizes);
  const T* weights = checked<T>(area_weight, "area_weight", corners);
  Tensor grad_pred = empty<T>(pred, sizes), grad_area_weight = empty<T>(pred, corners);
  ensemble_backward(grads, values, weights, sizes[0] * sizes[1], sizes[2], sizes[3], data<T>(grad_pred),
                    data<T>(grad_area_weight));
  return {grad_pred, grad_area_weight};
}

std::tuple<Tensor, Tensor> ensemble_backward_op(const Tensor& grad_out, const Tensor& pred, const Tensor& area_weight) {
  STD_TORCH_CHECK(pred.dim() == 4, "pred must have 4 dimensions");
  return pred.scalar_type() == ScalarType::Double ? run_ensemble_backward<double>(grad_out, pred, area_weight)
                                                  : run_ensemble_backward<float>(grad_out, pred, area_weight);
}

// ---------------------------------------------------------------------------------------------------------- processor

std::string cpu_isa() { return std::string(kernels().name) + (bf16_kernels() ? "+bf16" : ""); }
bool cpu_has_bf16() { return bf16_kernels() != nullptr; }
bool cpu_select_isa(std::string name) { return select_kernels(name.c_str()); }

// Floating point operations done by the register-only multiply-add loops of all threads; the caller takes the time.
double cpu_multiply_add_loop(std::string dtype, int64_t repetitions) {
  STD_TORCH_CHECK(dtype != "bfloat16" || bf16_kernels(), "this processor has no AVX-512-BF16");
  const auto loop = dtype == "bfloat16"  ? bf16_kernels()->multiply_add_loop
                    : dtype == "float64" ? kernels().double_kernels.multiply_add_loop
                                         : kernels().single_kernels.multiply_add_loop;
  const int64_t threads = thread_count();
  std::vector<double> operations(static_cast<size_t>(threads));
  parallel_shares(threads, threads,
                  [&](int64_t share, int64_t, int64_t) { operations[static_cast<size_t>(share)] = loop(repetitions); });
  return std::accumulate(operations.begin(), operations.end(), 0.0);
}

}  // namespace
}  // namespace liif_fast

STABLE_TORCH_LIBRARY(liif_fast_C, m) {
  m.def("gather(Tensor feat, Tensor coord, Tensor? cell, bool feat_unfold, bool local_ensemble) -> (Tensor, Tensor)");
  m.def(
      "gather_backward(Tensor grad_x, Tensor grad_area_weight, Tensor coord, int channels, int height, int width, bool "
      "has_cell, "
      "bool feat_unfold, bool local_ensemble) -> (Tensor, Tensor, Tensor)");
  m.def("ensemble(Tensor pred, Tensor area_weight) -> Tensor");
  m.def("ensemble_backward(Tensor grad_out, Tensor pred, Tensor area_weight) -> (Tensor, Tensor)");
  m.def(
      "decode(Tensor latent_map, Tensor? coord, Tensor? cell, Tensor weight_geometry, Tensor[] weights, Tensor[] "
      "biases, int[] grid, "
      "float[] grid_cell, bool local_ensemble, bool bf16) -> Tensor");
  m.def(
      "decode_backward(Tensor grad_out, Tensor latent_map, Tensor? coord, Tensor? cell, Tensor weight_geometry, "
      "Tensor[] weights, "
      "Tensor[] biases, int[] grid, float[] grid_cell, bool local_ensemble, bool bf16) -> Tensor[]");
  m.def(
      "metasr_query(Tensor latent_map, Tensor coord, Tensor cell, Tensor weight, Tensor bias, int[] region) -> Tensor");
  m.def(
      "metasr_query_backward(Tensor grad_out, Tensor latent_map, Tensor coord, Tensor cell, Tensor weight, Tensor "
      "bias, "
      "int[] region) -> Tensor[]");
  m.def("cpu_isa() -> str");
  m.def("cpu_has_bf16() -> bool");
  m.def("cpu_select_isa(str name) -> bool");
  m.def("cpu_multiply_add_loop(str dtype, int repetitions) -> float");
}

STABLE_TORCH_LIBRARY_IMPL(liif_fast_C, CPU, m) {
  m.impl("gather", TORCH_BOX(&liif_fast::gather));
  m.impl("gather_backward", TORCH_BOX(&liif_fast::gather_backward_op));
  m.impl("ensemble", TORCH_BOX(&liif_fast::ensemble));
  m.impl("ensemble_backward", TORCH_BOX(&liif_fast::ensemble_backward_op));
}

STABLE_TORCH_LIBRARY_IMPL(liif_fast_C, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&liif_fast::cpu_isa));
  m.impl("cpu_has_bf16", TORCH_BOX(&liif_fast::cpu_has_bf16));
  m.impl("cpu_select_isa", TORCH_BOX(&liif_fast::cpu_select_isa));
  m.impl("cpu_multiply_add_loop", TORCH_BOX(&liif_fast::cpu_multiply_add_loop));
}
