// The fused decode's problem from tensors, on whatever device: shared by bindings_query.cpp and
// bindings_cuda_query.cpp.
#pragma once

#include "bindings/common.h"
#include "decode.h"

namespace liif_fast {

// coord given: query. Otherwise grid = image height, width; window top, left, height, width; region top, left; map
// height, width. checked(tensor, name, sizes) is the data of a contiguous tensor of T on the right device, or throws.
template <class T, class Checked>
QueryProblem<T> query_problem(const Tensor& latent_map, const MaybeTensor& coord, const MaybeTensor& cell,
                              const Tensor& weight_geometry, const std::vector<Tensor>& weights,
                              const std::vector<Tensor>& biases, const Sizes& grid,
                              const std::vector<double>& grid_cell, bool local_ensemble, const Checked& checked) {
  QueryProblem<T> p{};
  STD_TORCH_CHECK(latent_map.dim() == 4 && latent_map.is_contiguous(),
                  "latent_map must be a contiguous tensor of 4 dimensions");
  STD_TORCH_CHECK(weight_geometry.dim() == 2, "weight_geometry must have 2 dimensions");
  p.batch = latent_map.size(0);
  p.region_height = latent_map.size(1);
  p.region_width = latent_map.size(2);
  p.width = latent_map.size(3);
  STD_TORCH_CHECK(p.region_height > 0 && p.region_width > 0 && p.width > 0, "latent_map must not be empty");
  p.latent_map = latent_map.const_data_ptr();
  p.corners = local_ensemble ? 4 : 1;
  p.has_cell = weight_geometry.size(1) == 4;
  if (coord) {
    STD_TORCH_CHECK(coord->dim() == 3, "coord must have 3 dimensions");
    p.queries = coord->size(1);
    p.map_height = p.region_height;
    p.map_width = p.region_width;
    p.coord = checked(*coord, "coord", {p.batch, p.queries, 2});
    if (cell) p.cell = checked(*cell, "cell", {p.batch, p.queries, 2});
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
  p.weight_geometry = checked(weight_geometry, "weight_geometry", {p.width, p.has_cell ? 4 : 2});
  STD_TORCH_CHECK(weights.size() <= kMaxLayers && biases.size() == weights.size() + 1, "an imnet of at most ",
                  kMaxLayers + 1, " layers, each with a bias, was expected");
  p.layers = static_cast<int>(weights.size());
  p.widths[0] = p.width;
  p.biases[0] = checked(biases[0], "bias", {p.width});
  for (int layer = 0; layer < p.layers; ++layer) {
    const size_t at = static_cast<size_t>(layer);
    STD_TORCH_CHECK(weights[at].dim() == 2, "a weight must have 2 dimensions");
    p.widths[layer + 1] = weights[at].size(0);
    STD_TORCH_CHECK(p.widths[layer + 1] > 0, "a layer must not be empty");
    p.weights[layer] = checked(weights[at], "weight", {p.widths[layer + 1], p.widths[layer]});
    p.biases[layer + 1] = checked(biases[at + 1], "bias", {p.widths[layer + 1]});
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

}  // namespace liif_fast
