// The extension's face to PyTorch, through the LibTorch stable ABI: memory-safety checks, allocation, dtype switch.
// liif_fast/ops/cpu.py is the only caller; messages for users are in liif_fast/ops/checks.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <numeric>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/ops.h"
#include "cpu/parallel.h"

namespace liif_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;
using Sizes = std::vector<int64_t>;

template <class T>
constexpr ScalarType kDtype = std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;

void check(const Tensor& tensor, const char* name, ScalarType dtype, const Sizes& sizes) {
  STD_TORCH_CHECK(tensor.is_cpu(), name, " must be a CPU tensor");
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous");
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, " has the wrong dtype");
  STD_TORCH_CHECK(tensor.dim() == static_cast<int64_t>(sizes.size()), name, " must have ", sizes.size(), " dimensions");
  for (size_t i = 0; i < sizes.size(); ++i)
    STD_TORCH_CHECK(tensor.size(static_cast<int64_t>(i)) == sizes[i], name, " must have size ", sizes[i],
                    " in dimension ", i, ", not ", tensor.size(static_cast<int64_t>(i)));
}

template <class T>
const T* checked(const Tensor& tensor, const char* name, const Sizes& sizes) {
  check(tensor, name, kDtype<T>, sizes);
  return static_cast<const T*>(tensor.const_data_ptr());
}

// Null only where the tensor is absent: an empty tensor's own pointer may be null too.
template <class T>
const T* checked(const MaybeTensor& tensor, const char* name, const Sizes& sizes) {
  static const T nothing{};
  if (!tensor) return nullptr;
  const T* values = checked<T>(*tensor, name, sizes);
  return values ? values : &nothing;
}

template <class T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

template <class T>
Tensor empty(const Tensor& like, const Sizes& sizes) {
  return torch::stable::new_empty(like, sizes, kDtype<T>);
}

template <class T>
Tensor zeros(const Tensor& like, const Sizes& sizes) {
  return torch::stable::new_zeros(like, sizes, kDtype<T>);
}

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

// --------------------------------------------------------------------------------------------------- query and render
// coord given: query. Otherwise grid = image height, width; window top, left, height, width; region top, left; map
// height, width.

template <class T>
QueryProblem<T> query_problem(const Tensor& latent_map, const MaybeTensor& coord, const MaybeTensor& cell,
                              const Tensor& weight_geometry, const std::vector<Tensor>& weights,
                              const std::vector<Tensor>& biases, const Sizes& grid,
                              const std::vector<double>& grid_cell, bool local_ensemble) {
  QueryProblem<T> p{};
  STD_TORCH_CHECK(latent_map.dim() == 4 && latent_map.is_cpu() && latent_map.is_contiguous(),
                  "latent_map must be a contiguous CPU tensor of 4 dimensions");
  p.batch = latent_map.size(0);
  p.region_height = latent_map.size(1);
  p.region_width = latent_map.size(2);
  p.width = latent_map.size(3);
  STD_TORCH_CHECK(p.region_height > 0 && p.region_width > 0 && p.width > 0, "latent_map must not be empty");
  p.latent_map = latent_map.const_data_ptr();
  p.corners = local_ensemble ? 4 : 1;
  p.has_cell = weight_geometry.size(1) == 4;
  if (coord) {
    p.queries = coord->size(1);
    p.map_height = p.region_height;
    p.map_width = p.region_width;
    p.coord = checked<T>(coord, "coord", {p.batch, p.queries, 2});
    p.cell = checked<T>(cell, "cell", {p.batch, p.queries, 2});
    STD_TORCH_CHECK(p.has_cell == (p.cell != nullptr), "cell and weight_geometry must agree");
  } else {
    STD_TORCH_CHECK(grid.size() == 10 && grid_cell.size() == 2, "a grid is ten sizes and a cell of two");
    p.image_height = grid[0];
    p.image_width = grid[1];
    p.window_top = grid[2];
    p.window_left = grid[3];
    p.window_height = grid[4];
    p.window_width = grid[5];
    p.region_top = grid[6];
    p.region_left = grid[7];
    p.map_height = grid[8];
    p.map_width = grid[9];
    p.queries = p.window_height * p.window_width;
    p.grid_cell[0] = static_cast<T>(grid_cell[0]);
    p.grid_cell[1] = static_cast<T>(grid_cell[1]);
    STD_TORCH_CHECK(p.image_height > 0 && p.image_width > 0 && p.window_height >= 0 && p.window_width >= 0 &&
                        p.map_height > 0 && p.map_width > 0,
                    "the grid has a negative size");
  }
  p.weight_geometry = checked<T>(weight_geometry, "weight_geometry", {p.width, p.has_cell ? 4 : 2});
  STD_TORCH_CHECK(weights.size() <= kMaxLayers && biases.size() == weights.size() + 1, "an imnet of at most ",
                  kMaxLayers + 1, " layers, each with a bias, was expected");
  p.layers = static_cast<int>(weights.size());
  p.widths[0] = p.width;
  p.biases[0] = checked<T>(biases[0], "bias", {p.width});
  for (int layer = 0; layer < p.layers; ++layer) {
    const size_t at = static_cast<size_t>(layer);
    STD_TORCH_CHECK(weights[at].dim() == 2, "a weight must have 2 dimensions");
    p.widths[layer + 1] = weights[at].size(0);
    STD_TORCH_CHECK(p.widths[layer + 1] > 0, "a layer must not be empty");
    p.weights[layer] = checked<T>(weights[at], "weight", {p.widths[layer + 1], p.widths[layer]});
    p.biases[layer + 1] = checked<T>(biases[at + 1], "bias", {p.widths[layer + 1]});
  }
  if (coord) {
    p.out_batch = p.queries * p.out_width();
    p.out_query = p.out_width();
    p.out_channel = 1;
  } else {
    p.out_batch = p.queries * p.out_width();
    p.out_query = 1;
    p.out_channel = p.queries;
  }
  return p;
}

template <class T>
Sizes out_sizes(const QueryProblem<T>& p) {
  if (p.coord) return {p.batch, p.queries, p.out_width()};
  return {p.batch, p.out_width(), p.window_height, p.window_width};
}

template <class T>
Tensor run_query(const Tensor& latent_map, const MaybeTensor& coord, const MaybeTensor& cell,
                 const Tensor& weight_geometry, const std::vector<Tensor>& weights, const std::vector<Tensor>& biases,
                 const Sizes& grid, const std::vector<double>& grid_cell, bool local_ensemble) {
  QueryProblem<T> p =
      query_problem<T>(latent_map, coord, cell, weight_geometry, weights, biases, grid, grid_cell, local_ensemble);
  Tensor out = empty<T>(latent_map, out_sizes(p));
  p.out = data<T>(out);
  if constexpr (std::is_same_v<T, float>) {
    if (latent_map.scalar_type() == ScalarType::BFloat16) {
      STD_TORCH_CHECK(bf16_kernels(), "this processor has no AVX-512-BF16: widen the latent map");
      query_forward_bf16(p);
      return out;
    }
  }
  STD_TORCH_CHECK(latent_map.scalar_type() == kDtype<T>, "latent_map has the wrong dtype");
  query_forward(p);
  return out;
}

Tensor query(const Tensor& latent_map, const MaybeTensor& coord, const MaybeTensor& cell, const Tensor& weight_geometry,
             const std::vector<Tensor>& weights, const std::vector<Tensor>& biases, const Sizes& grid,
             const std::vector<double>& grid_cell, bool local_ensemble) {
  const auto run = latent_map.scalar_type() == ScalarType::Double ? run_query<double> : run_query<float>;
  return run(latent_map, coord, cell, weight_geometry, weights, biases, grid, grid_cell, local_ensemble);
}

template <class T>
std::vector<Tensor> run_query_backward(const Tensor& grad_out, const Tensor& latent_map, const MaybeTensor& coord,
                                       const MaybeTensor& cell, const Tensor& weight_geometry,
                                       const std::vector<Tensor>& weights, const std::vector<Tensor>& biases,
                                       const Sizes& grid, const std::vector<double>& grid_cell, bool local_ensemble) {
  const QueryProblem<T> p =
      query_problem<T>(latent_map, coord, cell, weight_geometry, weights, biases, grid, grid_cell, local_ensemble);
  STD_TORCH_CHECK(latent_map.scalar_type() == kDtype<T>, "latent_map has the wrong dtype");
  QueryGrads<T> grads{};
  grads.grad_out = checked<T>(grad_out, "grad_out", out_sizes(p));
  // In the order of the Python side: latent_map, weight_geometry, weights, biases, coord, cell.
  std::vector<Tensor> out;
  const auto make = [&](const Sizes& sizes) {
    out.push_back(zeros<T>(latent_map, sizes));
    return data<T>(out.back());
  };
  grads.latent_map = make({p.batch, p.region_height, p.region_width, p.width});
  grads.weight_geometry = make({p.width, p.has_cell ? 4 : 2});
  for (int layer = 0; layer < p.layers; ++layer) grads.weights[layer] = make({p.widths[layer + 1], p.widths[layer]});
  for (int layer = 0; layer <= p.layers; ++layer) grads.biases[layer] = make({p.widths[layer]});
  if (p.coord) grads.coord = make({p.batch, p.queries, 2});
  if (p.cell) grads.cell = make({p.batch, p.queries, 2});
  query_backward(p, grads);
  return out;
}

std::vector<Tensor> query_backward_op(const Tensor& grad_out, const Tensor& latent_map, const MaybeTensor& coord,
                                      const MaybeTensor& cell, const Tensor& weight_geometry,
                                      const std::vector<Tensor>& weights, const std::vector<Tensor>& biases,
                                      const Sizes& grid, const std::vector<double>& grid_cell, bool local_ensemble) {
  const auto run =
      latent_map.scalar_type() == ScalarType::Double ? run_query_backward<double> : run_query_backward<float>;
  return run(grad_out, latent_map, coord, cell, weight_geometry, weights, biases, grid, grid_cell, local_ensemble);
}

// ------------------------------------------------------------------------------------------------------------- MetaSR

template <class T>
MetasrProblem<T> metasr_problem(const Tensor& latent_map, const Tensor& coord, const Tensor& cell, const Tensor& weight,
                                const Tensor& bias, const Sizes& region) {
  MetasrProblem<T> p{};
  STD_TORCH_CHECK(latent_map.dim() == 4 && coord.dim() == 3 && weight.dim() == 2,
                  "latent_map, coord or weight has a wrong rank");
  p.batch = latent_map.size(0);
  STD_TORCH_CHECK(region.size() == 4 && region[2] > 0 && region[3] > 0, "a region is top, left, map height, map width");
  p.region_height = latent_map.size(1);
  p.region_width = latent_map.size(2);
  p.region_top = region[0];
  p.region_left = region[1];
  p.map_height = region[2];
  p.map_width = region[3];
  p.queries = coord.size(1);
  p.hidden = weight.size(0);
  p.outs = latent_map.size(3) / (p.hidden + 1);
  STD_TORCH_CHECK(p.region_height > 0 && p.region_width > 0 && p.hidden > 0 && p.outs > 0,
                  "latent_map or weight is empty");
  p.latent_map =
      checked<T>(latent_map, "latent_map", {p.batch, p.region_height, p.region_width, p.outs * (p.hidden + 1)});
  p.coord = checked<T>(coord, "coord", {p.batch, p.queries, 2});
  p.cell = checked<T>(cell, "cell", {p.batch, p.queries, 2});
  p.weight = checked<T>(weight, "weight", {p.hidden, 3});
  p.bias = checked<T>(bias, "bias", {p.hidden});
  return p;
}

template <class T>
Tensor run_metasr(const Tensor& latent_map, const Tensor& coord, const Tensor& cell, const Tensor& weight,
                  const Tensor& bias, const Sizes& region) {
  MetasrProblem<T> p = metasr_problem<T>(latent_map, coord, cell, weight, bias, region);
  Tensor out = empty<T>(latent_map, {p.batch, p.queries, p.outs});
  p.out = data<T>(out);
  metasr_query_forward(p);
  return out;
}

Tensor metasr_query(const Tensor& latent_map, const Tensor& coord, const Tensor& cell, const Tensor& weight,
                    const Tensor& bias, const Sizes& region) {
  const auto run = latent_map.scalar_type() == ScalarType::Double ? run_metasr<double> : run_metasr<float>;
  return run(latent_map, coord, cell, weight, bias, region);
}

template <class T>
std::vector<Tensor> run_metasr_backward(const Tensor& grad_out, const Tensor& latent_map, const Tensor& coord,
                                        const Tensor& cell, const Tensor& weight, const Tensor& bias,
                                        const Sizes& region) {
  const MetasrProblem<T> p = metasr_problem<T>(latent_map, coord, cell, weight, bias, region);
  MetasrGrads<T> grads{};
  grads.grad_out = checked<T>(grad_out, "grad_out", {p.batch, p.queries, p.outs});
  std::vector<Tensor> out{zeros<T>(latent_map, {p.batch, p.region_height, p.region_width, p.outs * (p.hidden + 1)}),
                          zeros<T>(coord, {p.batch, p.queries, 2}), zeros<T>(cell, {p.batch, p.queries, 2}),
                          zeros<T>(weight, {p.hidden, 3}), zeros<T>(bias, {p.hidden})};
  grads.latent_map = data<T>(out[0]);
  grads.coord = data<T>(out[1]);
  grads.cell = data<T>(out[2]);
  grads.weight = data<T>(out[3]);
  grads.bias = data<T>(out[4]);
  metasr_query_backward(p, grads);
  return out;
}

std::vector<Tensor> metasr_query_backward_op(const Tensor& grad_out, const Tensor& latent_map, const Tensor& coord,
                                             const Tensor& cell, const Tensor& weight, const Tensor& bias,
                                             const Sizes& region) {
  const auto run =
      latent_map.scalar_type() == ScalarType::Double ? run_metasr_backward<double> : run_metasr_backward<float>;
  return run(grad_out, latent_map, coord, cell, weight, bias, region);
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
      "query(Tensor latent_map, Tensor? coord, Tensor? cell, Tensor weight_geometry, Tensor[] weights, Tensor[] "
      "biases, int[] grid, "
      "float[] grid_cell, bool local_ensemble) -> Tensor");
  m.def(
      "query_backward(Tensor grad_out, Tensor latent_map, Tensor? coord, Tensor? cell, Tensor weight_geometry, "
      "Tensor[] weights, "
      "Tensor[] biases, int[] grid, float[] grid_cell, bool local_ensemble) -> Tensor[]");
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
  m.impl("query", TORCH_BOX(&liif_fast::query));
  m.impl("query_backward", TORCH_BOX(&liif_fast::query_backward_op));
  m.impl("metasr_query", TORCH_BOX(&liif_fast::metasr_query));
  m.impl("metasr_query_backward", TORCH_BOX(&liif_fast::metasr_query_backward_op));
}

STABLE_TORCH_LIBRARY_IMPL(liif_fast_C, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&liif_fast::cpu_isa));
  m.impl("cpu_has_bf16", TORCH_BOX(&liif_fast::cpu_has_bf16));
  m.impl("cpu_select_isa", TORCH_BOX(&liif_fast::cpu_select_isa));
  m.impl("cpu_multiply_add_loop", TORCH_BOX(&liif_fast::cpu_multiply_add_loop));
}

#ifdef LIIF_FAST_PYTHON_MODULE
// Lets `import liif_fast._C` work too; loading the library is what registers the ops.
#include <Python.h>
extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C() {
  static PyModuleDef module{PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
#endif
