// The CUDA launchers on numpy arrays, for pytest: gather and ensemble. The headers have the other ops: in one source,
// since pybind11 takes ten seconds of the compiler for each.
#include <array>

#include "module_decode.h"
#include "module_metasr.h"
#include "module_products.h"
#include "numpy_arrays.h"
#include "simt.h"

namespace liif_fast {
namespace {

template <class T>
GatherProblem<T> make_problem(const py::array& coord, const std::array<int64_t, 3>& sizes, bool has_cell,
                              bool feat_unfold, bool local_ensemble) {
  GatherProblem<T> p{};
  p.batch = coord.shape(0);
  p.queries = coord.shape(1);
  p.channels = sizes[0];
  p.height = sizes[1];
  p.width = sizes[2];
  p.corners = local_ensemble ? 4 : 1;
  p.feat_unfold = feat_unfold;
  p.has_cell = has_cell;
  p.coord = read<T>(coord);
  return p;
}

template <class T>
py::tuple gather_forward(const std::string& dtype, const py::array& feat, const py::array& coord,
                         const std::optional<py::array>& cell, bool feat_unfold, bool local_ensemble) {
  GatherProblem<T> p = make_problem<T>(coord, {feat.shape(1), feat.shape(2), feat.shape(3)}, cell.has_value(),
                                       feat_unfold, local_ensemble);
  if (cell) p.cell = read<T>(*cell);
  const int64_t item = feat.itemsize();
  const FeatStrides strides{feat.strides(0) / item, feat.strides(1) / item, feat.strides(2) / item,
                            feat.strides(3) / item};
  py::array x = make(feat.dtype(), {p.batch, p.queries, p.corners, p.depth()}, kNaN);
  py::array area_weight = make(coord.dtype(), {p.batch, p.queries, p.corners}, kNaN);
  check(launch_gather_forward(p, parse(dtype), feat.data(), strides, x.mutable_data(), write<T>(area_weight), nullptr));
  return py::make_tuple(x, area_weight);
}

// dtype, then the arguments of the op cuda_gather_backward.
template <class T>
py::tuple gather_backward(const py::args& arguments) {
  const auto array = [&](size_t i) { return arguments[i].cast<py::array>(); };
  const auto flag = [&](size_t i) { return arguments[i].cast<bool>(); };
  const auto size = [&](size_t i) { return arguments[i].cast<int64_t>(); };
  const py::array grad_x = array(1), grad_area_weight = array(2), coord = array(3);
  const GatherProblem<T> p = make_problem<T>(coord, {size(4), size(5), size(6)}, flag(7), flag(8), flag(9));
  const bool deterministic = flag(10), channels_last = flag(11);
  const Shape first{p.batch, p.channels, p.height, p.width}, last{p.batch, p.height, p.width, p.channels};
  py::array grad_feat = make(coord.dtype(), channels_last ? last : first, 0);
  py::array grad_coord = make(coord.dtype(), {p.batch, p.queries, 2}, kNaN);
  py::array grad_cell = make(coord.dtype(), p.has_cell ? Shape{p.batch, p.queries, 2} : Shape{0}, kNaN);
  check(launch_gather_backward(p, parse(arguments[0].cast<std::string>()), whole_map(p, channels_last),
                               {grad_x.data(), read<T>(grad_area_weight), write<T>(grad_feat), write<T>(grad_coord),
                                p.has_cell ? write<T>(grad_cell) : nullptr},
                               deterministic, nullptr));
  return py::make_tuple(grad_feat, grad_coord, grad_cell);
}

template <class T>
EnsembleProblem<T> make_problem(const py::array& pred, const py::array& area_weight) {
  return {pred.shape(0) * pred.shape(1), pred.shape(2), pred.shape(3), pred.data(), read<T>(area_weight)};
}

template <class T>
py::array ensemble_forward(const std::string& dtype, const py::array& pred, const py::array& area_weight) {
  py::array out = make(area_weight.dtype(), {pred.shape(0), pred.shape(1), pred.shape(3)}, kNaN);
  check(launch_ensemble_forward(make_problem<T>(pred, area_weight), parse(dtype), write<T>(out), nullptr));
  return out;
}

template <class T>
py::tuple ensemble_backward(const std::string& dtype, const py::array& grad_out, const py::array& pred,
                            const py::array& area_weight) {
  const Shape corners{pred.shape(0), pred.shape(1), pred.shape(2)};
  py::array grad_pred = make(area_weight.dtype(), {corners[0], corners[1], corners[2], pred.shape(3)}, kNaN);
  py::array grad_area_weight = make(area_weight.dtype(), corners, kNaN);
  check(launch_ensemble_backward(make_problem<T>(pred, area_weight), parse(dtype),
                                 {read<T>(grad_out), write<T>(grad_pred), write<T>(grad_area_weight)}, nullptr));
  return py::make_tuple(grad_pred, grad_area_weight);
}

py::array convolution(const py::array& map, const py::array& kernels, bool transposed, bool in_bfloat16) {
  ConvolutionProblem p{};
  p.batch = map.shape(0);
  p.height = map.shape(1);
  p.width = map.shape(2);
  p.channels = map.shape(3);
  p.outs = kernels.shape(transposed ? 1 : 0);
  py::array out =
      make(map.dtype(), {map.shape(0), map.shape(1), map.shape(2), kernels.shape(transposed ? 1 : 0)}, kNaN);
  p.map = read<float>(map);
  p.kernels = read<float>(kernels);
  p.transposed = transposed;
  p.in_bfloat16 = in_bfloat16;
  p.out = write<float>(out);
  std::vector<unsigned char> workspace(static_cast<size_t>(convolution_workspace(p)));
  check(launch_convolution(p, workspace.data(), nullptr));
  return out;
}

// latents, grads: float16, or the bits of bfloat16.
py::array kernel_grads(const py::array& latents, const py::array& grads, int64_t row_pixels, int64_t channels,
                       int64_t outs) {
  KernelGradsProblem p{};
  p.pixels = grads.shape(0);
  p.row_pixels = row_pixels;
  p.in_bfloat16 = latents.dtype().kind() != 'f';
  p.latent_channels = static_cast<int>(latents.shape(1));
  p.grad_channels = static_cast<int>(grads.shape(1));
  p.channels = channels;
  p.outs = outs;
  p.latents = latents.data();
  p.grads = grads.data();
  py::array out = make(py::dtype::of<float>(), {outs, channels, 3, 3}, kNaN);
  p.out = write<float>(out);
  std::vector<unsigned char> workspace(static_cast<size_t>(kernel_grads_workspace(p)), kNaN);
  check(launch_kernel_grads(p, workspace.data(), nullptr));
  return out;
}

}  // namespace

void bind_gather(py::module_& m) {
  const auto geometry = [](const std::string& dtype) { return dtype == "float64"; };
  m.def("gather_forward", [=](const std::string& dtype, const py::array& feat, const py::array& coord,
                              const std::optional<py::array>& cell, bool feat_unfold, bool local_ensemble) {
    const auto run = geometry(dtype) ? gather_forward<double> : gather_forward<float>;
    return run(dtype, feat, coord, cell, feat_unfold, local_ensemble);
  });
  m.def("gather_backward", [=](const py::args& arguments) {
    return geometry(arguments[0].cast<std::string>()) ? gather_backward<double>(arguments)
                                                      : gather_backward<float>(arguments);
  });
  m.def("ensemble_forward", [=](const std::string& dtype, const py::array& pred, const py::array& area_weight) {
    return geometry(dtype) ? ensemble_forward<double>(dtype, pred, area_weight)
                           : ensemble_forward<float>(dtype, pred, area_weight);
  });
  m.def("ensemble_backward",
        [=](const std::string& dtype, const py::array& grad_out, const py::array& pred, const py::array& area_weight) {
          return geometry(dtype) ? ensemble_backward<double>(dtype, grad_out, pred, area_weight)
                                 : ensemble_backward<float>(dtype, grad_out, pred, area_weight);
        });
  m.def("convolution", convolution);
  m.def("kernel_grads", kernel_grads);
}

}  // namespace liif_fast

PYBIND11_MODULE(cuda_on_cpu_kernels, m) {
  liif_fast::bind_gather(m);
  liif_fast::bind_decode(m);
  liif_fast::bind_metasr(m);
  liif_fast::bind_products(m);
  m.def(
      "set_schedule",
      [](unsigned most_blocks, bool backwards, unsigned seed) {
        cuda_on_cpu::schedule = {most_blocks, backwards, seed};
      },
      pybind11::arg("most_blocks"), pybind11::arg("backwards"), pybind11::arg("seed") = 0);
}
