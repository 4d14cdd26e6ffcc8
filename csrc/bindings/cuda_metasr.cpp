// MetaSR's decode on the GPU: checks, allocation, dtype switch.
#ifdef LIIF_FAST_WITH_CUDA
#include "bindings/cuda.h"

namespace liif_fast {
namespace {

// sizes: of the latent map in memory, [batch, height, width].
template <class T>
MetasrProblem<T> metasr_points(const Tensor& coord, const Tensor& cell, const Sizes& region, const Sizes& sizes) {
  MetasrProblem<T> p{};
  STD_TORCH_CHECK(coord.is_cuda() && coord.dim() == 3, "coord must be a CUDA tensor of 3 dimensions");
  STD_TORCH_CHECK(region.size() == 4 && region[2] > 0 && region[3] > 0, "a region is top, left, map height, map width");
  STD_TORCH_CHECK(sizes.size() == 3 && sizes[0] >= 0 && sizes[1] > 0 && sizes[2] > 0, "latent_map is empty");
  p.batch = sizes[0];
  p.queries = coord.size(1);
  p.region_top = region[0];
  p.region_left = region[1];
  p.map_height = region[2];
  p.map_width = region[3];
  p.region_height = sizes[1];
  p.region_width = sizes[2];
  const int32_t device = coord.get_device_index();
  p.coord = checked<T>(coord, "coord", device, {p.batch, p.queries, 2});
  p.cell = checked<T>(cell, "cell", device, {p.batch, p.queries, 2});
  return p;
}

template <class T>
MetasrProblem<T> metasr_problem(const Tensor& latent_map, const Tensor& coord, const Tensor& cell, const Tensor& weight,
                                const Tensor& bias, const Sizes& region) {
  const int32_t device = coord.get_device_index();
  MetasrProblem<T> p =
      metasr_points<T>(coord, cell, region, {latent_map.size(0), latent_map.size(1), latent_map.size(2)});
  STD_TORCH_CHECK(weight.dim() == 2 && weight.size(0) > 0, "weight must be a matrix, and not empty");
  p.hidden = weight.size(0);
  p.outs = latent_map.size(3) / (p.hidden + 1);
  STD_TORCH_CHECK(p.outs > 0, "latent_map is too narrow for weight");
  check_contiguous(latent_map, "latent_map", device,
                   {p.batch, p.region_height, p.region_width, p.outs * (p.hidden + 1)});
  p.weight = checked<T>(weight, "weight", device, {p.hidden, 3});
  p.bias = checked<T>(bias, "bias", device, {p.hidden});
  return p;
}

void check_map(const Tensor& latent_map) {
  STD_TORCH_CHECK(latent_map.is_cuda() && latent_map.dim() == 4, "latent_map must be a CUDA tensor of 4 dimensions");
}

template <class T>
Tensor run_metasr(const Tensor& latent_map, const Tensor& coord, const Tensor& cell, const Tensor& weight,
                  const Tensor& bias, const Sizes& region) {
  MetasrProblem<T> p = metasr_problem<T>(latent_map, coord, cell, weight, bias, region);
  const int32_t device = latent_map.get_device_index();
  const DeviceGuard guard(device);
  Tensor out = empty<T>(coord, {p.batch, p.queries, p.outs});
  p.out = data<T>(out);
  check_launch(launch_metasr_forward(p, dtype_of(latent_map, "latent_map"), latent_map.const_data_ptr(),
                                     current_stream(device)));
  return out;
}

Tensor metasr_query(const Tensor& latent_map, const Tensor& coord, const Tensor& cell, const Tensor& weight,
                    const Tensor& bias, const Sizes& region) {
  check_map(latent_map);
  const auto run = latent_map.scalar_type() == ScalarType::Double ? run_metasr<double> : run_metasr<float>;
  return run(latent_map, coord, cell, weight, bias, region);
}

template <class T>
Tensor run_latents(const Tensor& coord, const Tensor& cell, const Sizes& region, const Sizes& sizes) {
  const MetasrProblem<T> p = metasr_points<T>(coord, cell, region, sizes);
  const int32_t device = coord.get_device_index();
  const DeviceGuard guard(device);
  Tensor latents = torch::stable::new_empty(coord, {p.batch * p.queries}, ScalarType::Long);
  check_launch(launch_metasr_latents(p, data<int64_t>(latents), current_stream(device)));
  return latents;
}

Tensor metasr_latents(const Tensor& coord, const Tensor& cell, const Sizes& region, const Sizes& sizes) {
  const auto run = coord.scalar_type() == ScalarType::Double ? run_latents<double> : run_latents<float>;
  return run(coord, cell, region, sizes);
}

const int64_t* checked_indices(const MaybeTensor& tensor, const char* name, int32_t device, int64_t size) {
  if (!tensor) return nullptr;
  check_contiguous(*tensor, name, device, {size});
  STD_TORCH_CHECK(tensor->scalar_type() == ScalarType::Long, name, " must be int64");
  return static_cast<const int64_t*>(tensor->const_data_ptr());
}

template <class T>
std::vector<Tensor> run_metasr_backward(const Tensor& grad_out, const Tensor& latent_map, const Tensor& coord,
                                        const Tensor& cell, const Tensor& weight, const Tensor& bias,
                                        const Sizes& region, const MaybeTensor& order, const MaybeTensor& starts) {
  const MetasrProblem<T> p = metasr_problem<T>(latent_map, coord, cell, weight, bias, region);
  const int32_t device = latent_map.get_device_index();
  const DeviceGuard guard(device);
  STD_TORCH_CHECK(order.has_value() == starts.has_value(), "order and starts belong together");
  const Sizes map_sizes{p.batch, p.region_height, p.region_width, p.outs * (p.hidden + 1)};
  // In the order of the Python side: latent_map, coord, cell, weight, bias.
  std::vector<Tensor> out{order ? empty<T>(coord, map_sizes) : zeros<T>(coord, map_sizes),
                          empty<T>(coord, {p.batch, p.queries, 2}), empty<T>(coord, {p.batch, p.queries, 2}),
                          empty<T>(coord, {p.hidden, 3}), empty<T>(coord, {p.hidden})};
  const MetasrGrads<T> grads{checked<T>(grad_out, "grad_out", device, {p.batch, p.queries, p.outs}),
                             data<T>(out[0]),
                             data<T>(out[1]),
                             data<T>(out[2]),
                             data<T>(out[3]),
                             data<T>(out[4])};
  Tensor workspace = empty<T>(coord, {metasr_workspace(p)});
  check_launch(
      launch_metasr_backward(p, dtype_of(latent_map, "latent_map"), latent_map.const_data_ptr(), grads,
                             checked_indices(order, "order", device, p.batch * p.queries),
                             checked_indices(starts, "starts", device, p.batch * p.region_height * p.region_width + 1),
                             data<T>(workspace), current_stream(device)));
  return out;
}

std::vector<Tensor> metasr_query_backward(const Tensor& grad_out, const Tensor& latent_map, const Tensor& coord,
                                          const Tensor& cell, const Tensor& weight, const Tensor& bias,
                                          const Sizes& region, const MaybeTensor& order, const MaybeTensor& starts) {
  check_map(latent_map);
  const auto run =
      latent_map.scalar_type() == ScalarType::Double ? run_metasr_backward<double> : run_metasr_backward<float>;
  return run(grad_out, latent_map, coord, cell, weight, bias, region, order, starts);
}

}  // namespace
}  // namespace liif_fast

// The forward's schema is bindings.cpp's. These two are CUDA's own: only here does the order of the sums need a choice.
STABLE_TORCH_LIBRARY_FRAGMENT(liif_fast_C, m) {
  m.def("cuda_metasr_latents(Tensor coord, Tensor cell, int[] region, int[] sizes) -> Tensor");
  m.def(
      "cuda_metasr_query_backward(Tensor grad_out, Tensor latent_map, Tensor coord, Tensor cell, Tensor weight, "
      "Tensor bias, int[] region, Tensor? order, Tensor? starts) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(liif_fast_C, CUDA, m) {
  m.impl("metasr_query", TORCH_BOX(&liif_fast::metasr_query));
  m.impl("cuda_metasr_latents", TORCH_BOX(&liif_fast::metasr_latents));
  m.impl("cuda_metasr_query_backward", TORCH_BOX(&liif_fast::metasr_query_backward));
}
#endif
