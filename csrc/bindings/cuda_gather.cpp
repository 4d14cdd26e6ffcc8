// The CUDA half of the extension's face to PyTorch: checks, allocation, dtype switch, device, stream. gather and
// ensemble are here; the other ops in the other bindings_cuda_*.cpp.
// liif_fast/ops/backends/cuda/ is the only caller. It needs no CUDA torch and no CUDA header: built anywhere, it works
// where the installed torch has CUDA.
#ifdef LIIF_FAST_WITH_CUDA
#include <dlfcn.h>

#include "bindings/cuda.h"

namespace liif_fast {

// Its library is asked at run time: RTLD_DEFAULT does not find the symbol, and a link against it would tie the
// extension to a CUDA torch.
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

template <class T>
GatherProblem<T> gather_problem(const Tensor& coord, int64_t channels, int64_t height, int64_t width, bool has_cell,
                                bool feat_unfold, bool local_ensemble) {
  GatherProblem<T> p{};
  STD_TORCH_CHECK(coord.dim() == 3, "coord must have 3 dimensions");
  STD_TORCH_CHECK(channels > 0 && height > 0 && width > 0, "feat must not be empty");
  p.batch = coord.size(0);
  p.queries = coord.size(1);
  p.channels = channels;
  p.height = height;
  p.width = width;
  p.corners = local_ensemble ? 4 : 1;
  p.feat_unfold = feat_unfold;
  p.has_cell = has_cell;
  p.coord = checked<T>(coord, "coord", coord.get_device_index(), {p.batch, p.queries, 2});
  return p;
}

template <class T>
std::tuple<Tensor, Tensor> run_gather(const Tensor& feat, const Tensor& coord, const MaybeTensor& cell,
                                      bool feat_unfold, bool local_ensemble) {
  const int32_t device = feat.get_device_index();
  GatherProblem<T> p =
      gather_problem<T>(coord, feat.size(1), feat.size(2), feat.size(3), cell.has_value(), feat_unfold, local_ensemble);
  check(coord, "coord", device, {feat.size(0), p.queries, 2});
  if (cell) p.cell = checked<T>(*cell, "cell", device, {p.batch, p.queries, 2});
  const FeatStrides strides{feat.stride(0), feat.stride(1), feat.stride(2), feat.stride(3)};
  const DeviceGuard guard(device);
  Tensor x = torch::stable::new_empty(feat, {p.batch, p.queries, p.corners, p.depth()});
  Tensor area_weight = empty<T>(feat, {p.batch, p.queries, p.corners});
  check_launch(launch_gather_forward(p, dtype_of(feat, "feat"), feat.const_data_ptr(), strides, x.mutable_data_ptr(),
                                     data<T>(area_weight), current_stream(device)));
  return {x, area_weight};
}

std::tuple<Tensor, Tensor> gather(const Tensor& feat, const Tensor& coord, const MaybeTensor& cell, bool feat_unfold,
                                  bool local_ensemble) {
  STD_TORCH_CHECK(feat.is_cuda() && feat.dim() == 4, "feat must be a CUDA tensor of 4 dimensions");
  const auto run = feat.scalar_type() == ScalarType::Double ? run_gather<double> : run_gather<float>;
  return run(feat, coord, cell, feat_unfold, local_ensemble);
}

template <class T>
std::tuple<Tensor, Tensor, Tensor> run_gather_backward(const Tensor& grad_x, const Tensor& grad_area_weight,
                                                       const Tensor& coord, int64_t channels, int64_t height,
                                                       int64_t width, bool has_cell, bool feat_unfold,
                                                       bool local_ensemble, bool deterministic, bool channels_last) {
  const int32_t device = coord.get_device_index();
  const GatherProblem<T> p = gather_problem<T>(coord, channels, height, width, has_cell, feat_unfold, local_ensemble);
  check_contiguous(grad_x, "grad_x", device, {p.batch, p.queries, p.corners, p.depth()});
  const T* const grad_weights =
      checked<T>(grad_area_weight, "grad_area_weight", device, {p.batch, p.queries, p.corners});
  const DeviceGuard guard(device);
  Tensor grad_feat = channels_last ? zeros<T>(coord, {p.batch, height, width, channels})
                                   : zeros<T>(coord, {p.batch, channels, height, width});
  Tensor grad_coord = empty<T>(coord, {p.batch, p.queries, 2});
  Tensor grad_cell = has_cell ? empty<T>(coord, {p.batch, p.queries, 2}) : empty<T>(coord, {0});
  check_launch(launch_gather_backward(p, dtype_of(grad_x, "grad_x"), grad_x.const_data_ptr(), grad_weights,
                                      whole_map(channels, height, width, channels_last), data<T>(grad_feat),
                                      data<T>(grad_coord), has_cell ? data<T>(grad_cell) : nullptr, deterministic,
                                      current_stream(device)));
  return {grad_feat, grad_coord, grad_cell};
}

std::tuple<Tensor, Tensor, Tensor> gather_backward(const Tensor& grad_x, const Tensor& grad_area_weight,
                                                   const Tensor& coord, int64_t channels, int64_t height, int64_t width,
                                                   bool has_cell, bool feat_unfold, bool local_ensemble,
                                                   bool deterministic, bool channels_last) {
  STD_TORCH_CHECK(coord.is_cuda(), "coord must be a CUDA tensor");
  const auto run = coord.scalar_type() == ScalarType::Double ? run_gather_backward<double> : run_gather_backward<float>;
  return run(grad_x, grad_area_weight, coord, channels, height, width, has_cell, feat_unfold, local_ensemble,
             deterministic, channels_last);
}

// [batch, queries, corners, outs] of a prediction, contiguous and on a GPU.
Sizes prediction_sizes(const Tensor& pred) {
  STD_TORCH_CHECK(pred.is_cuda() && pred.dim() == 4 && pred.is_contiguous(),
                  "pred must be a contiguous CUDA tensor of 4 dimensions");
  return {pred.size(0), pred.size(1), pred.size(2), pred.size(3)};
}

template <class T>
Tensor run_ensemble(const Tensor& pred, const Tensor& area_weight) {
  const int32_t device = pred.get_device_index();
  const Sizes sizes = prediction_sizes(pred);
  const T* const weights = checked<T>(area_weight, "area_weight", device, {sizes[0], sizes[1], sizes[2]});
  const DeviceGuard guard(device);
  Tensor out = empty<T>(pred, {sizes[0], sizes[1], sizes[3]});
  check_launch(launch_ensemble_forward(dtype_of(pred, "pred"), pred.const_data_ptr(), weights, sizes[0] * sizes[1],
                                       sizes[2], sizes[3], data<T>(out), current_stream(device)));
  return out;
}

Tensor ensemble(const Tensor& pred, const Tensor& area_weight) {
  const auto run = pred.scalar_type() == ScalarType::Double ? run_ensemble<double> : run_ensemble<float>;
  return run(pred, area_weight);
}

template <class T>
std::tuple<Tensor, Tensor> run_ensemble_backward(const Tensor& grad_out, const Tensor& pred,
                                                 const Tensor& area_weight) {
  const int32_t device = pred.get_device_index();
  const Sizes sizes = prediction_sizes(pred), corners{sizes[0], sizes[1], sizes[2]};
  const T* const grads = checked<T>(grad_out, "grad_out", device, {sizes[0], sizes[1], sizes[3]});
  const T* const weights = checked<T>(area_weight, "area_weight", device, corners);
  const DeviceGuard guard(device);
  Tensor grad_pred = empty<T>(pred, sizes), grad_area_weight = empty<T>(pred, corners);
  check_launch(launch_ensemble_backward(dtype_of(pred, "pred"), grads, pred.const_data_ptr(), weights,
                                        sizes[0] * sizes[1], sizes[2], sizes[3], data<T>(grad_pred),
                                        data<T>(grad_area_weight), current_stream(device)));
  return {grad_pred, grad_area_weight};
}

std::tuple<Tensor, Tensor> ensemble_backward(const Tensor& grad_out, const Tensor& pred, const Tensor& area_weight) {
  const auto run =
      pred.scalar_type() == ScalarType::Double ? run_ensemble_backward<double> : run_ensemble_backward<float>;
  return run(grad_out, pred, area_weight);
}

}  // namespace
}  // namespace liif_fast

// The other schemas are bindings.cpp's. This one is CUDA's own: only here do the order of the sums and the layout of
// feat's gradient, [B, H, W, C] with channels_last, need a choice.
STABLE_TORCH_LIBRARY_FRAGMENT(liif_fast_C, m) {
  m.def(
      "cuda_gather_backward(Tensor grad_x, Tensor grad_area_weight, Tensor coord, int channels, int height, int width, "
      "bool has_cell, bool feat_unfold, bool local_ensemble, bool deterministic, bool channels_last) "
      "-> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(liif_fast_C, CUDA, m) {
  m.impl("gather", TORCH_BOX(&liif_fast::gather));
  m.impl("cuda_gather_backward", TORCH_BOX(&liif_fast::gather_backward));
  m.impl("ensemble", TORCH_BOX(&liif_fast::ensemble));
  m.impl("ensemble_backward", TORCH_BOX(&liif_fast::ensemble_backward));
}
#endif
