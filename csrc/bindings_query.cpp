// The fused decodes' bindings: query, render and MetaSR.
#include "bindings_cpu.h"
#include "cpu/kernels.h"
#include "cpu/ops.h"

namespace liif_fast {
namespace {

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
  p.out_batch = p.queries * p.out_width();
  p.out_query = coord ? p.out_width() : 1;
  p.out_channel = coord ? 1 : p.queries;
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

}  // namespace
}  // namespace liif_fast

STABLE_TORCH_LIBRARY_IMPL(liif_fast_C, CPU, m) {
  m.impl("query", TORCH_BOX(&liif_fast::query));
  m.impl("query_backward", TORCH_BOX(&liif_fast::query_backward_op));
  m.impl("metasr_query", TORCH_BOX(&liif_fast::metasr_query));
  m.impl("metasr_query_backward", TORCH_BOX(&liif_fast::metasr_query_backward_op));
}
