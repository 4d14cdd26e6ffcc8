// MetaSR's decode on a GPU.
#ifdef LIIF_FAST_WITH_CUDA
#include "bindings/cuda.h"

namespace liif_fast {
namespace {

Tensor metasr_query(const Tensor& latent_map, const Tensor& coord, const Tensor& cell, const Tensor& weight,
                    const Tensor& bias, const Sizes& region) {
  check_on_gpu(latent_map, "latent_map", 4);
  return with_geometry(latent_map, [&](auto zero) {
    using T = decltype(zero);
    MetasrProblem<T> p = metasr_problem<T>({latent_map, coord, cell, weight, bias, region});
    const int32_t device = latent_map.get_device_index();
    const DeviceGuard guard(device);
    Tensor out = empty<T>(coord, {p.batch, p.queries, p.outs});
    p.out = data<T>(out);
    check_launch(launch_metasr_forward(p, to_dtype(latent_map, "latent_map"), current_stream(device)));
    return out;
  });
}

// sizes: batch, height, width of the latent map in memory.
Tensor metasr_latents(const Tensor& coord, const Tensor& cell, const Sizes& region, const Sizes& sizes) {
  check_on_gpu(coord, "coord", 3);
  return with_geometry(coord, [&](auto zero) {
    using T = decltype(zero);
    STD_TORCH_CHECK(sizes.size() == 3, "sizes are batch, height and width of the latent map");
    const MetasrProblem<T> p = metasr_points<T>(coord, cell, region, {sizes[0], sizes[1], sizes[2], 0}, 0);
    const int32_t device = coord.get_device_index();
    const DeviceGuard guard(device);
    Tensor latents = torch::stable::new_empty(coord, {p.batch * p.queries}, ScalarType::Long);
    check_launch(launch_metasr_latents(p, data<int64_t>(latents), current_stream(device)));
    return latents;
  });
}

const int64_t* checked_indices(const MaybeTensor& tensor, const char* name, int32_t device, int64_t size) {
  if (!tensor) return nullptr;
  check_contiguous(*tensor, name, device, {size});
  STD_TORCH_CHECK(tensor->scalar_type() == ScalarType::Long, name, " must be int64");
  return static_cast<const int64_t*>(tensor->const_data_ptr());
}

std::vector<Tensor> metasr_query_backward(const Tensor& grad_out, const Tensor& latent_map, const Tensor& coord,
                                          const Tensor& cell, const Tensor& weight, const Tensor& bias,
                                          const Sizes& region, const MaybeTensor& order, const MaybeTensor& starts) {
  check_on_gpu(latent_map, "latent_map", 4);
  return with_geometry(latent_map, [&](auto zero) {
    using T = decltype(zero);
    const MetasrProblem<T> p = metasr_problem<T>({latent_map, coord, cell, weight, bias, region});
    const int32_t device = latent_map.get_device_index();
    const DeviceGuard guard(device);
    STD_TORCH_CHECK(order.has_value() == starts.has_value(), "order and starts belong together");
    // In the order of the Python side: latent_map, coord, cell, weight, bias.
    std::vector<Tensor> out{order ? empty<T>(coord, map_sizes(p)) : zeros<T>(coord, map_sizes(p)),
                            empty<T>(coord, {p.batch, p.queries, 2}), empty<T>(coord, {p.batch, p.queries, 2}),
                            empty<T>(coord, {p.hidden, 3}), empty<T>(coord, {p.hidden})};
    Tensor workspace = empty<T>(coord, {metasr_workspace(p)});
    const MetasrOrder sorted{checked_indices(order, "order", device, p.batch * p.queries),
                             checked_indices(starts, "starts", device, p.batch * p.region_height * p.region_width + 1)};
    check_launch(
        launch_metasr_backward(p, to_dtype(latent_map, "latent_map"),
                               {checked<T>(grad_out, "grad_out", device, {p.batch, p.queries, p.outs}), data<T>(out[0]),
                                data<T>(out[1]), data<T>(out[2]), data<T>(out[3]), data<T>(out[4])},
                               sorted, data<T>(workspace), current_stream(device)));
    return out;
  });
}

}  // namespace

// library.cpp has the forward's schema. These two ops exist for CUDA alone: only here does the order of the sums need a
// choice.
void register_cuda_metasr(Registry& ops) {
  ops.def("cuda_metasr_latents(Tensor coord, Tensor cell, int[] region, int[] sizes) -> Tensor");
  ops.def(
      "cuda_metasr_query_backward(Tensor grad_out, Tensor latent_map, Tensor coord, Tensor cell, Tensor weight, "
      "Tensor bias, int[] region, Tensor? order, Tensor? starts) -> Tensor[]");
  ops.impl("CUDA", "metasr_query", TORCH_BOX(&metasr_query));
  ops.impl("CUDA", "cuda_metasr_latents", TORCH_BOX(&metasr_latents));
  ops.impl("CUDA", "cuda_metasr_query_backward", TORCH_BOX(&metasr_query_backward));
}

}  // namespace liif_fast
#endif
