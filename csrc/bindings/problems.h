// From an op's tensors to the kernels' problem, on any device: each op's arguments as its schema declares them, and the
// function that checks and unpacks them.
#pragma once

#include "bindings/common.h"
#include "bindings/registry.h"
#include "decode.h"
#include "gather.h"
#include "metasr.h"

namespace liif_fast {

// ------------------------------------------------------------------------------------------------- gather and ensemble

// The arguments that gather and its backward share.
struct GatherInputs {
  const Tensor& coord;
  int64_t channels, height, width;  // of feat
  bool has_cell, feat_unfold, local_ensemble;
};

// All but `cell`.
template <class T>
GatherProblem<T> gather_problem(const GatherInputs& in, int32_t device) {
  STD_TORCH_CHECK(in.coord.dim() == 3, "coord must have 3 dimensions");
  STD_TORCH_CHECK(in.channels > 0 && in.height > 0 && in.width > 0, "feat must not be empty");
  const int64_t batch = in.coord.size(0), queries = in.coord.size(1);
  return {batch,          in.channels,
          in.height,      in.width,
          queries,        in.local_ensemble ? 4 : 1,
          in.feat_unfold, checked<T>(in.coord, "coord", device, {batch, queries, 2}),
          nullptr,        in.has_cell};
}

// pred: [batch, queries, corners, outs]. Its dtype is the caller's to check.
template <class T>
EnsembleProblem<T> ensemble_problem(const Tensor& pred, const Tensor& area_weight, int32_t device) {
  STD_TORCH_CHECK(pred.dim() == 4, "pred must have 4 dimensions");
  check_contiguous(pred, "pred", device, {pred.size(0), pred.size(1), pred.size(2), pred.size(3)});
  return {pred.size(0) * pred.size(1), pred.size(2), pred.size(3), pred.const_data_ptr(),
          checked<T>(area_weight, "area_weight", device, {pred.size(0), pred.size(1), pred.size(2)})};
}

// -------------------------------------------------------------------------------------------------------------- decode

// The arguments that decode and decode_backward share. liif_fast/ops/inputs.py describes them.
struct DecodeInputs {
  const Tensor& latent_map;
  const MaybeTensor &coord, &cell;
  const Tensor& weight_geometry;
  const std::vector<Tensor>&weights, &biases;
  const Sizes& grid;
  const std::vector<double>& grid_cell;
  bool local_ensemble;
  const MaybeTensor& query_term;
};

// All but `out`. The dtype of the latent map is the caller's to check.
template <class T>
DecodeProblem<T> decode_problem(const DecodeInputs& in) {
  const Tensor& map = in.latent_map;
  const int32_t device = device_index(map);
  STD_TORCH_CHECK(map.dim() == 4 && map.is_contiguous(), "latent_map must be a contiguous tensor of 4 dimensions");
  STD_TORCH_CHECK(map.size(1) > 0 && map.size(2) > 0 && map.size(3) > 0, "latent_map must not be empty");
  STD_TORCH_CHECK(in.weight_geometry.dim() == 2, "weight_geometry must have 2 dimensions");
  STD_TORCH_CHECK(!in.coord || in.coord->dim() == 3, "coord must have 3 dimensions");
  STD_TORCH_CHECK(in.coord || (in.grid.size() == 10 && (in.grid_cell.size() == 2 || in.grid_cell.size() == 6)),
                  "a grid is ten sizes and a cell of two, with origin and step of rows and columns if they are not the "
                  "image's own");
  DecodeProblem<T> p = make_decode_problem<T>({map.size(0), map.size(1), map.size(2), map.size(3)},
                                              in.coord ? in.coord->size(1) : 0, in.coord ? nullptr : in.grid.data(),
                                              in.grid_cell.data(), in.local_ensemble, in.grid_cell.size() == 6);
  p.latent_map = map.const_data_ptr();
  p.has_cell = in.weight_geometry.size(1) == 4;
  if (in.coord) {
    p.coord = checked<T>(in.coord, "coord", device, {p.batch, p.queries, 2});
    p.cell = checked<T>(in.cell, "cell", device, {p.batch, p.queries, 2});
    STD_TORCH_CHECK(p.has_cell == (p.cell != nullptr), "cell and weight_geometry must agree");
  } else {
    STD_TORCH_CHECK(p.image_height > 0 && p.image_width > 0 && p.window_height >= 0 && p.window_width >= 0 &&
                        p.map_height > 0 && p.map_width > 0,
                    "the grid has a negative size");
  }
  p.query_term = checked<T>(in.query_term, "query_term", device, {p.batch, p.queries, p.width});
  p.weight_geometry = checked<T>(in.weight_geometry, "weight_geometry", device, {p.width, p.has_cell ? 4 : 2});
  STD_TORCH_CHECK(in.weights.size() <= kMaxLayers && in.biases.size() == in.weights.size() + 1, "an imnet of at most ",
                  kMaxLayers + 1, " layers, each with a bias, was expected");
  p.layers = static_cast<int>(in.weights.size());
  p.biases[0] = checked<T>(in.biases[0], "bias", device, {p.width});
  for (int layer = 0; layer < p.layers; ++layer) {
    const Tensor& weight = in.weights[static_cast<size_t>(layer)];
    STD_TORCH_CHECK(weight.dim() == 2, "a weight must have 2 dimensions");
    p.widths[layer + 1] = weight.size(0);
    STD_TORCH_CHECK(p.widths[layer + 1] > 0, "a layer must not be empty");
    p.weights[layer] = checked<T>(weight, "weight", device, {p.widths[layer + 1], p.widths[layer]});
    p.biases[layer + 1] = checked<T>(in.biases[static_cast<size_t>(layer) + 1], "bias", device, {p.widths[layer + 1]});
  }
  set_out_layout(p);
  return p;
}

template <class T>
Sizes out_sizes(const DecodeProblem<T>& p) {
  if (p.coord) return {p.batch, p.queries, p.out_width()};
  return {p.batch, p.out_width(), p.window_height, p.window_width};
}

// -------------------------------------------------------------------------------------------------------------- MetaSR

struct MetasrInputs {
  const Tensor &latent_map, &coord, &cell, &weight, &bias;
  const Sizes& region;  // top, left, map height, map width
};

// The problem without latent map and filter. map: batch, height, width, channels of the latent map in memory.
template <class T>
MetasrProblem<T> metasr_points(const Tensor& coord, const Tensor& cell, const Sizes& region, const int64_t (&map)[4],
                               int64_t hidden) {
  STD_TORCH_CHECK(coord.dim() == 3, "coord must have 3 dimensions");
  STD_TORCH_CHECK(region.size() == 4 && region[2] > 0 && region[3] > 0, "a region is top, left, map height, map width");
  STD_TORCH_CHECK(map[0] >= 0 && map[1] > 0 && map[2] > 0, "latent_map is empty");
  MetasrProblem<T> p = make_metasr_problem<T>(map, coord.size(1), region.data(), hidden);
  const int32_t device = device_index(coord);
  p.coord = checked<T>(coord, "coord", device, {p.batch, p.queries, 2});
  p.cell = checked<T>(cell, "cell", device, {p.batch, p.queries, 2});
  return p;
}

template <class T>
Sizes map_sizes(const MetasrProblem<T>& p) {
  return {p.batch, p.region_height, p.region_width, p.outs * (p.hidden + 1)};
}

// All but `out`. The dtype of the latent map is the caller's to check.
template <class T>
MetasrProblem<T> metasr_problem(const MetasrInputs& in) {
  const Tensor& map = in.latent_map;
  STD_TORCH_CHECK(map.dim() == 4 && in.weight.dim() == 2, "latent_map or weight has a wrong rank");
  MetasrProblem<T> p = metasr_points<T>(in.coord, in.cell, in.region,
                                        {map.size(0), map.size(1), map.size(2), map.size(3)}, in.weight.size(0));
  STD_TORCH_CHECK(p.hidden > 0 && p.outs > 0, "weight is empty, or latent_map too narrow for it");
  const int32_t device = device_index(in.coord);
  check_contiguous(map, "latent_map", device, map_sizes(p));
  p.latent_map = map.const_data_ptr();
  p.weight = checked<T>(in.weight, "weight", device, {p.hidden, 3});
  p.bias = checked<T>(in.bias, "bias", device, {p.hidden});
  return p;
}

}  // namespace liif_fast
