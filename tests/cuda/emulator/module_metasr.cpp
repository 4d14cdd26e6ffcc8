// The launchers of MetaSR's decode on numpy arrays.
#include "numpy_arrays.h"

namespace liif_fast {
namespace {

using Region = std::vector<int64_t>;  // top, left, height and width of the whole map
using Ordered = std::optional<std::pair<py::array, py::array>>;

// sizes: of the latent map in memory, [batch, height, width, outs * (hidden + 1)].
template <class T>
MetasrProblem<T> make_problem(const Shape& sizes, const py::array& coord, const py::array& cell, const Region& region) {
  MetasrProblem<T> p{};
  p.batch = sizes[0];
  p.queries = coord.shape(1);
  p.region_top = region[0];
  p.region_left = region[1];
  p.map_height = region[2];
  p.map_width = region[3];
  p.region_height = sizes[1];
  p.region_width = sizes[2];
  p.coord = read<T>(coord);
  p.cell = read<T>(cell);
  return p;
}

Shape sizes_of(const py::array& array) { return {array.shape(), array.shape() + array.ndim()}; }

template <class T>
MetasrProblem<T> make_problem(const py::array& latent_map, const py::array& coord, const py::array& cell,
                              const py::array& weight, const py::array& bias, const Region& region) {
  if (!(latent_map.flags() & py::array::c_style)) throw std::invalid_argument("latent_map is not contiguous");
  MetasrProblem<T> p = make_problem<T>(sizes_of(latent_map), coord, cell, region);
  p.hidden = weight.shape(0);
  p.outs = latent_map.shape(3) / (p.hidden + 1);
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
  check(launch_metasr_forward(p, parse(dtype), latent_map.data(), nullptr));
  return out;
}

template <class T>
py::list backward(const std::string& dtype, const py::array& grad_out, const py::array& latent_map,
                  const py::array& coord, const py::array& cell, const py::array& weight, const py::array& bias,
                  const Region& region, const Ordered& ordered) {
  const MetasrProblem<T> p = make_problem<T>(latent_map, coord, cell, weight, bias, region);
  const auto like = [&](const py::array& array, int byte) { return make(coord.dtype(), sizes_of(array), byte); };
  py::array grad_map = like(latent_map, ordered ? kNaN : 0), grad_coord = like(coord, kNaN);
  py::array grad_cell = like(cell, kNaN), grad_weight = like(weight, kNaN), grad_bias = like(bias, kNaN);
  py::array workspace = make(coord.dtype(), {metasr_workspace(p)}, kNaN);
  const MetasrGrads<T> grads{read<T>(grad_out),   write<T>(grad_map),    write<T>(grad_coord),
                             write<T>(grad_cell), write<T>(grad_weight), write<T>(grad_bias)};
  check(launch_metasr_backward(p, parse(dtype), latent_map.data(), grads,
                               ordered ? read<int64_t>(ordered->first) : nullptr,
                               ordered ? read<int64_t>(ordered->second) : nullptr, write<T>(workspace), nullptr));
  py::list result;
  for (const py::array& grad : {grad_map, grad_coord, grad_cell, grad_weight, grad_bias}) result.append(grad);
  return result;
}

template <class T>
py::array latents(const py::array& coord, const py::array& cell, const Region& region, const Shape& sizes) {
  const MetasrProblem<T> p = make_problem<T>(sizes, coord, cell, region);
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
  m.def("metasr_backward", [](const std::string& dtype, const py::array& grad_out, const py::array& latent_map,
                              const py::array& coord, const py::array& cell, const py::array& weight,
                              const py::array& bias, const Region& region, const Ordered& ordered) {
    const auto run = dtype == "float64" ? backward<double> : backward<float>;
    return run(dtype, grad_out, latent_map, coord, cell, weight, bias, region, ordered);
  });
  m.def("metasr_latents", [](const py::array& coord, const py::array& cell, const Region& region, const Shape& sizes) {
    return coord.itemsize() == 8 ? latents<double>(coord, cell, region, sizes)
                                 : latents<float>(coord, cell, region, sizes);
  });
}

}  // namespace liif_fast
