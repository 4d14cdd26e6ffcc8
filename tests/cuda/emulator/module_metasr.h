// The launchers of MetaSR's folded decode on numpy arrays.
#pragma once

#include "numpy_arrays.h"

namespace liif_fast {
namespace {

using Region = std::vector<int64_t>;  // top, left, height and width of the whole map
using Ordered = std::optional<std::pair<py::array, py::array>>;

Shape shape(const py::array& array) { return {array.shape(), array.shape() + array.ndim()}; }

template <class T>
MetasrProblem<T> make_problem(const py::array& latent_map, const py::array& coord, const py::array& cell,
                              const py::array& weight, const py::array& bias, const Region& region) {
  if (!(latent_map.flags() & py::array::c_style)) throw std::invalid_argument("latent_map is not contiguous");
  const auto size = [&](int axis) { return int64_t{latent_map.shape(axis)}; };
  MetasrProblem<T> p =
      make_metasr_problem<T>({size(0), size(1), size(2), size(3)}, coord.shape(1), region.data(), weight.shape(0));
  p.latent_map = latent_map.data();
  p.coord = read<T>(coord);
  p.cell = read<T>(cell);
  p.weight = read<T>(weight);
  p.bias = read<T>(bias);
  return p;
}

template <class T>
py::array forward(const std::string& dtype, const py::array& latent_map, const py::array& coord, const py::array& cell,
                  const py::array& weight, const py::array& bias, const Region& region) {
  MetasrProblem<T> p = make_problem<T>(latent_map, coord, cell, weight, bias, region);
  py::array out = make(coord.dtype(), {p.batch, p.queries, p.outs}, kNaN);
  p.out = write<T>(out);
  check(launch_metasr_forward(p, parse(dtype), nullptr));
  return out;
}

// dtype, then the arguments of the op cuda_metasr_query_backward up to region, then order and starts as a pair or None.
template <class T>
py::list backward(const py::args& arguments) {
  const auto array = [&](size_t i) { return arguments[i].cast<py::array>(); };
  const py::array grad_out = array(1), latent_map = array(2), coord = array(3), cell = array(4);
  const py::array weight = array(5), bias = array(6);
  const auto ordered = arguments[8].cast<Ordered>();
  const MetasrProblem<T> p = make_problem<T>(latent_map, coord, cell, weight, bias, arguments[7].cast<Region>());
  const auto like = [&](const py::array& array, int byte) { return make(coord.dtype(), shape(array), byte); };
  py::array grad_map = like(latent_map, ordered ? kNaN : 0), grad_coord = like(coord, kNaN);
  py::array grad_cell = like(cell, kNaN), grad_weight = like(weight, kNaN), grad_bias = like(bias, kNaN);
  py::array workspace = make(coord.dtype(), {metasr_workspace(p)}, kNaN);
  MetasrOrder sorted{};
  if (ordered) sorted = {read<int64_t>(ordered->first), read<int64_t>(ordered->second)};
  check(launch_metasr_backward(p, parse(arguments[0].cast<std::string>()),
                               {read<T>(grad_out), write<T>(grad_map), write<T>(grad_coord), write<T>(grad_cell),
                                write<T>(grad_weight), write<T>(grad_bias)},
                               sorted, write<T>(workspace), nullptr));
  py::list result;
  for (const py::array& grad : {grad_map, grad_coord, grad_cell, grad_weight, grad_bias}) result.append(grad);
  return result;
}

template <class T>
py::array latents(const py::array& coord, const py::array& cell, const Region& region, const Shape& sizes) {
  MetasrProblem<T> p = make_metasr_problem<T>({sizes[0], sizes[1], sizes[2], 0}, coord.shape(1), region.data(), 0);
  p.coord = read<T>(coord);
  p.cell = read<T>(cell);
  py::array result = make(py::dtype::of<int64_t>(), {p.batch * p.queries}, kNaN);
  check(launch_metasr_latents(p, write<int64_t>(result), nullptr));
  return result;
}

}  // namespace

void bind_metasr(py::module_& m) {
  m.def("metasr_forward",
        [](const std::string& dtype, const py::array& latent_map, const py::array& coord, const py::array& cell,
           const py::array& weight, const py::array& bias, const Region& region) {
          const auto run = dtype == "float64" ? forward<double> : forward<float>;
          return run(dtype, latent_map, coord, cell, weight, bias, region);
        });
  m.def("metasr_backward", [](const py::args& arguments) {
    return arguments[0].cast<std::string>() == "float64" ? backward<double>(arguments) : backward<float>(arguments);
  });
  m.def("metasr_latents", [](const py::array& coord, const py::array& cell, const Region& region, const Shape& sizes) {
    return coord.itemsize() == 8 ? latents<double>(coord, cell, region, sizes)
                                 : latents<float>(coord, cell, region, sizes);
  });
}

}  // namespace liif_fast
