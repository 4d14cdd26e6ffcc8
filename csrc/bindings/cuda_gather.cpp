// gather and ensemble on a GPU, and torch's current stream. liif_fast/ops/backends/cuda/ is the only caller of the CUDA
// bindings. They need no CUDA torch and no CUDA header: built anywhere, they work where the installed torch has CUDA.
#ifdef LIIF_FAST_WITH_CUDA
#include <dlfcn.h>

#include "bindings/cuda.h"

// Of CUDA's runtime, which is linked statically; declared here because no CUDA header is needed. Both return 0.
extern "C" int cudaDriverGetVersion(int* version);
extern "C" int cudaRuntimeGetVersion(int* version);

namespace liif_fast {

// The symbol is looked up in torch's library at run time. RTLD_DEFAULT does not find it, and a link against the library
// would tie the extension to a CUDA torch.
void* current_stream(int32_t device) {
  using Function = int32_t (*)(int32_t, void**);
  static const Function function = [] {
    void* const library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<Function>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  STD_TORCH_CHECK(function, "this torch has no CUDA");
  void* stream = nullptr;
  STD_TORCH_CHECK(function(device, &stream) == 0, "the current stream of cuda:", device, " could not be found");
  return stream;
}

namespace {

// 13020 for CUDA 13.2: what the driver supports (0 without a driver), and the runtime of this extension.
std::tuple<int64_t, int64_t> cuda_versions() {
  int driver = 0, runtime = 0;
  STD_TORCH_CHECK(cudaDriverGetVersion(&driver) == 0 && cudaRuntimeGetVersion(&runtime) == 0,
                  "CUDA does not tell its versions");
  return {driver, runtime};
}

std::tuple<Tensor, Tensor> gather(const Tensor& feat, const Tensor& coord, const MaybeTensor& cell, bool feat_unfold,
                                  bool local_ensemble) {
  check_on_gpu(feat, "feat", 4);
  return with_geometry(feat, [&](auto zero) {
    using T = decltype(zero);
    const int32_t device = feat.get_device_index();
    GatherProblem<T> p = gather_problem<T>(
        {coord, feat.size(1), feat.size(2), feat.size(3), cell.has_value(), feat_unfold, local_ensemble}, device);
    STD_TORCH_CHECK(feat.size(0) == p.batch, "feat must have coord's batch");
    p.cell = checked<T>(cell, "cell", device, {p.batch, p.queries, 2});
    const FeatStrides strides{feat.stride(0), feat.stride(1), feat.stride(2), feat.stride(3)};
    const DeviceGuard guard(device);
    Tensor x = torch::stable::new_empty(feat, {p.batch, p.queries, p.corners, p.depth()});
    Tensor area_weight = empty<T>(feat, {p.batch, p.queries, p.corners});
    check_launch(launch_gather_forward(p, to_dtype(feat, "feat"), feat.const_data_ptr(), strides, x.mutable_data_ptr(),
                                       data<T>(area_weight), current_stream(device)));
    return std::make_tuple(x, area_weight);
  });
}

std::tuple<Tensor, Tensor, Tensor> gather_backward(const Tensor& grad_x, const Tensor& grad_area_weight,
                                                   const Tensor& coord, int64_t channels, int64_t height, int64_t width,
                                                   bool has_cell, bool feat_unfold, bool local_ensemble,
                                                   bool deterministic, bool channels_last) {
  check_on_gpu(coord, "coord", 3);
  return with_geometry(coord, [&](auto zero) {
    using T = decltype(zero);
    const int32_t device = coord.get_device_index();
    const GatherProblem<T> p =
        gather_problem<T>({coord, channels, height, width, has_cell, feat_unfold, local_ensemble}, device);
    check_contiguous(grad_x, "grad_x", device, {p.batch, p.queries, p.corners, p.depth()});
    const T* const grad_weights =
        checked<T>(grad_area_weight, "grad_area_weight", device, {p.batch, p.queries, p.corners});
    const DeviceGuard guard(device);
    const Sizes first{p.batch, p.channels, p.height, p.width}, last{p.batch, p.height, p.width, p.channels};
    Tensor grad_feat = zeros<T>(coord, channels_last ? last : first);
    Tensor grad_coord = empty<T>(coord, {p.batch, p.queries, 2});
    Tensor grad_cell = empty<T>(coord, p.has_cell ? Sizes{p.batch, p.queries, 2} : Sizes{0});
    check_launch(launch_gather_backward(p, to_dtype(grad_x, "grad_x"), whole_map(p, channels_last),
                                        {grad_x.const_data_ptr(), grad_weights, data<T>(grad_feat), data<T>(grad_coord),
                                         p.has_cell ? data<T>(grad_cell) : nullptr},
                                        deterministic, current_stream(device)));
    return std::make_tuple(grad_feat, grad_coord, grad_cell);
  });
}

void check_prediction(const Tensor& pred) {
  STD_TORCH_CHECK(pred.is_cuda() && pred.is_contiguous(), "pred must be a contiguous CUDA tensor");
}

Tensor ensemble(const Tensor& pred, const Tensor& area_weight) {
  check_prediction(pred);
  return with_geometry(pred, [&](auto zero) {
    using T = decltype(zero);
    const int32_t device = pred.get_device_index();
    const EnsembleProblem<T> p = ensemble_problem<T>(pred, area_weight, device);
    const DeviceGuard guard(device);
    Tensor out = empty<T>(pred, {pred.size(0), pred.size(1), p.outs});
    check_launch(launch_ensemble_forward(p, to_dtype(pred, "pred"), data<T>(out), current_stream(device)));
    return out;
  });
}

std::tuple<Tensor, Tensor> ensemble_backward(const Tensor& grad_out, const Tensor& pred, const Tensor& area_weight) {
  check_prediction(pred);
  return with_geometry(pred, [&](auto zero) {
    using T = decltype(zero);
    const int32_t device = pred.get_device_index();
    const EnsembleProblem<T> p = ensemble_problem<T>(pred, area_weight, device);
    const int64_t batch = pred.size(0), queries = pred.size(1);
    const T* const grads = checked<T>(grad_out, "grad_out", device, {batch, queries, p.outs});
    const DeviceGuard guard(device);
    Tensor grad_pred = empty<T>(pred, {batch, queries, p.corners, p.outs});
    Tensor grad_area_weight = empty<T>(pred, {batch, queries, p.corners});
    check_launch(launch_ensemble_backward(
        p, to_dtype(pred, "pred"), {grads, data<T>(grad_pred), data<T>(grad_area_weight)}, current_stream(device)));
    return std::make_tuple(grad_pred, grad_area_weight);
  });
}

}  // namespace

// library.cpp has the schemas that CPU and CUDA share. This op exists for CUDA alone: only here do the order of the
// sums and the layout of feat's gradient ([B, H, W, C] with channels_last) need a choice.
void register_cuda_gather(Registry& ops) {
  ops.def(
      "cuda_gather_backward(Tensor grad_x, Tensor grad_area_weight, Tensor coord, int channels, int height, int width, "
      "bool has_cell, bool feat_unfold, bool local_ensemble, bool deterministic, bool channels_last) "
      "-> (Tensor, Tensor, Tensor)");
  ops.def("cuda_versions() -> (int, int)");
  ops.impl("CompositeExplicitAutograd", "cuda_versions", TORCH_BOX(&cuda_versions));
  ops.impl("CUDA", "gather", TORCH_BOX(&gather));
  ops.impl("CUDA", "cuda_gather_backward", TORCH_BOX(&gather_backward));
  ops.impl("CUDA", "ensemble", TORCH_BOX(&ensemble));
  ops.impl("CUDA", "ensemble_backward", TORCH_BOX(&ensemble_backward));
}

}  // namespace liif_fast
#endif
