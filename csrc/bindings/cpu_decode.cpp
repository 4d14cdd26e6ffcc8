// The fused decodes' bindings: query, render and MetaSR.
#include "bindings/cpu.h"
#include "bindings/decode_problem.h"
#include "cpu/kernels.h"
#include "cpu/ops.h"

namespace liif_fast {
namespace {

// --------------------------------------------------------------------------------------------------- query and render

template <class T>
QueryProblem<T> cpu_problem(const Tensor& latent_map, const MaybeTensor& coord, const MaybeTensor& cell,
                            const Tensor& weight_geometry, const std::vector<Tensor>& weights,
                            const std::vector<Tensor>& biases, const Sizes& grid, const std::vector<double>& grid_cell,
                            bool local_ensemble) {
  STD_TORCH_CHECK(latent_map.is_cpu(), "latent_map must be a CPU tensor");
  const auto on_cpu = [](const Tensor& tensor, const char* name, const Sizes& sizes) {
    return checked<T>(MaybeTensor(tensor), name, sizes);
  };
  return query_problem<T>(latent_map, coord, cell, weight_geometry, weights, biases, grid, grid_cell, local_ensemble,
                          on_cpu);
}

// bf16, here and below: whether products have bfloat16 operands; in float64 it means nothing.
void check_bf16(bool bf16) {
  STD_TORCH_CHECK(!bf16 || bf16_kernels(), "this processor has no AVX-512-BF16: multiply in float32");
}

template <class T>
Tensor run_query(const Tensor& latent_map, const MaybeTensor& coord, const MaybeTensor& cell,
                 const Tensor& weight_geometry, const std::vector<Tensor>& weights, const std::vector<Tensor>& biases,
                 const Sizes& grid, const std::vector<double>& grid_cell, bool local_ensemble, bool bf16) {
  QueryProblem<T> p =
      cpu_problem<T>(latent_map, coord, cell, weight_geometry, weights, biases, grid, grid_cell, local_ensemble);
  Tensor out = empty<T>(latent_map, out_sizes(p));
  p.out = data<T>(out);
  const bool bf16_map = bf16 && latent_map.scalar_type() == ScalarType::BFloat16;
  STD_TORCH_CHECK(bf16_map || latent_map.scalar_type() == kDtype<T>, "latent_map has the wrong dtype");
  if constexpr (std::is_same_v<T, float>) {
    if (bf16) {
      query_forward_bf16(p, bf16_map);
      return out;
    }
  }
  query_forward(p);
  return out;
}

Tensor query(const Tensor& latent_map, const MaybeTensor& coord, const MaybeTensor& cell, const Tensor& weight_geometry,
             const std::vector<Tensor>& weights, const std::vector<Tensor>& biases, const Sizes& grid,
             const std::vector<double>& grid_cell, bool local_ensemble, bool bf16) {
  check_bf16(bf16);
  const auto run = latent_map.scalar_type() == ScalarType::Double ? run_query<double> : run_query<float>;
  return run(latent_map, coord, cell, weight_geometry, weights, biases, grid, grid_cell, local_ensemble, bf16);
}

template <class T>
std::vector<Tensor> run_query_backward(const Tensor& grad_out, const Tensor& latent_map, const MaybeTensor& coord,
                                       const MaybeTensor& cell, const Tensor& weight_geometry,
                                       const std::vector<Tensor>& weights, const std::vector<Tensor>& biases,
                                       const Sizes& grid, const std::vector<double>& grid_cell, bool local_ensemble,
                                       bool bf16) {
  const QueryProblem<T> p =
      cpu_problem<T>(latent_map, coord, cell, weight_geometry, weights, biases, grid, grid_cell, local_ensemble);
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
  if constexpr (std::is_same_v<T, float>) {
    if (bf16) {
      query_backward_bf16(p, grads);
      return out;
    }
  }
  query_backward(p, grads);
  return out;
}

std::vector<Tensor> query_backward_op(const Tensor& grad_out, const Tensor& latent_map, const MaybeTensor& coord,
                                      const MaybeTensor& cell, const Tensor& weight_geometry,
                                      const std::vector<Tensor>& weights, const std::vector<Tensor>& biases,
                                      const Sizes& grid, const std::vector<double>& grid_cell, bool local_ensemble,
                                      bool bf16) {
  check_bf16(bf16);
  const auto run =
      latent_map.scalar_type() == ScalarType::Double ? run_query_backward<double> : run_query_backward<float>;
  return run(grad_out, latent_map, coord, cell, weight_geometry, weights, biases, grid, grid_cell, local_ensemble,
             bf16);
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
  m.impl("decode", TORCH_BOX(&liif_fast::query));
  m.impl("decode_backward", TORCH_BOX(&liif_fast::query_backward_op));
  m.impl("metasr_query", TORCH_BOX(&liif_fast::metasr_query));
  m.impl("metasr_query_backward", TORCH_BOX(&liif_fast::metasr_query_backward_op));
}
