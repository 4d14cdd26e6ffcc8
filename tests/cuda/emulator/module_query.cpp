// The fused decode's launchers on numpy arrays: the steps of csrc/bindings_cuda_query.cpp.
#include "cuda/decode/variant.h"
#include "numpy_arrays.h"
#include "simt.h"

namespace liif_fast {
namespace {

using Arrays = std::vector<py::array>;
using MaybeArray = std::optional<py::array>;

QueryProblem<float> make_problem(const py::array& latent_map, const MaybeArray& coord, const MaybeArray& cell,
                                 const py::array& weight_geometry, const Arrays& weights, const Arrays& biases,
                                 const std::vector<int64_t>& grid, const std::vector<double>& grid_cell,
                                 bool local_ensemble) {
  QueryProblem<float> p{};
  p.batch = latent_map.shape(0);
  p.region_height = latent_map.shape(1);
  p.region_width = latent_map.shape(2);
  p.width = latent_map.shape(3);
  p.latent_map = latent_map.data();
  p.corners = local_ensemble ? 4 : 1;
  p.has_cell = weight_geometry.shape(1) == 4;
  if (coord) {
    p.queries = coord->shape(1);
    p.map_height = p.region_height;
    p.map_width = p.region_width;
    p.coord = read<float>(*coord);
    if (cell) p.cell = read<float>(*cell);
  } else {
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
    p.grid_cell[0] = static_cast<float>(grid_cell[0]);
    p.grid_cell[1] = static_cast<float>(grid_cell[1]);
  }
  p.weight_geometry = read<float>(weight_geometry);
  p.layers = static_cast<int>(weights.size());
  p.widths[0] = p.width;
  for (int layer = 0; layer <= p.layers; ++layer) p.biases[layer] = read<float>(biases[static_cast<size_t>(layer)]);
  for (int layer = 0; layer < p.layers; ++layer) {
    p.weights[layer] = read<float>(weights[static_cast<size_t>(layer)]);
    p.widths[layer + 1] = weights[static_cast<size_t>(layer)].shape(0);
  }
  p.out_batch = p.queries * p.out_width();
  p.out_query = coord ? p.out_width() : 1;
  p.out_channel = coord ? 1 : p.queries;
  return p;
}

QueryVariant variant_for(const QueryProblem<float>& p, int operands) {
  int64_t widest = p.width;
  for (int layer = 1; layer < p.layers; ++layer) widest = std::max(widest, p.widths[layer]);
  const char* error = nullptr;
  const QueryVariant variant = choose_variant(static_cast<Operands>(operands), static_cast<int>(widest), &error);
  check(error);
  return variant;
}

bool is_float(const py::array& array) { return py::isinstance<py::array_t<float>>(array); }

py::array bytes_of(int64_t size) { return make(py::dtype::of<uint8_t>(), {size}, kNaN); }

py::array forward(const py::array& latent_map, const MaybeArray& coord, const MaybeArray& cell,
                  const py::array& weight_geometry, const Arrays& weights, const Arrays& biases,
                  const std::vector<int64_t>& grid, const std::vector<double>& grid_cell, bool local_ensemble,
                  int operands, py::array saved, bool last_layer, int64_t first_row, int64_t rows) {
  QueryProblem<float> p =
      make_problem(latent_map, coord, cell, weight_geometry, weights, biases, grid, grid_cell, local_ensemble);
  const QueryVariant variant = variant_for(p, operands);
  const int hidden = p.layers - 1, outs = static_cast<int>(p.out_width());
  py::array out =
      make(py::dtype::of<float>(),
           coord ? Shape{p.batch, p.queries, outs} : Shape{p.batch, outs, p.window_height, p.window_width}, kNaN);
  p.out = write<float>(out);
  py::array packed = bytes_of(packed_bytes(variant, hidden, outs));
  check(launch_pack(p, variant, false, packed.mutable_data(), nullptr));
  Saved keep{};
  if (saved.size() > 0) {
    if (saved.size() < saved_bytes(variant, hidden, p.corners, last_layer, rows))
      throw std::invalid_argument("saved is too small");
    keep = saved_at(saved.mutable_data(), variant, hidden, p.corners, last_layer, first_row, rows);
  }
  const QueryTask task = make_task(p, variant, packed.data(), is_float(latent_map), first_row, rows);
  check(launch_query_forward(task, variant, keep, nullptr));
  return out;
}

py::tuple backward(const py::array& grad_out, py::array saved, int64_t saved_first_row, int64_t saved_rows,
                   const py::array& latent_map, const MaybeArray& coord, const MaybeArray& cell,
                   const py::array& weight_geometry, const Arrays& weights, const Arrays& biases,
                   const std::vector<int64_t>& grid, const std::vector<double>& grid_cell, bool local_ensemble,
                   int operands, int64_t first_row, int64_t rows, py::array grad_latent_map, py::array grad_coord,
                   py::array grad_cell) {
  const QueryProblem<float> p =
      make_problem(latent_map, coord, cell, weight_geometry, weights, biases, grid, grid_cell, local_ensemble);
  const QueryVariant variant = variant_for(p, operands);
  const int hidden = p.layers - 1, outs = static_cast<int>(p.out_width());
  py::array packed = bytes_of(packed_bytes(variant, hidden, outs));
  check(launch_pack(p, variant, true, packed.mutable_data(), nullptr));
  const bool in_rows = grad_latent_map.size() == 0, last_layer = grad_coord.size() > 0;
  const Saved kept =
      saved_at(saved.mutable_data(), variant, hidden, p.corners, last_layer, saved_first_row, saved_rows);
  const py::dtype floats = py::dtype::of<float>();
  const bool wide = operand_bytes(variant.operands) == 4;
  py::array gradient_rows = make(wide ? floats : py::dtype::of<uint16_t>(), {hidden, rows, variant.width}, kNaN);
  py::array sums =
      make(floats, {int64_t{variant.blocks} * variant.row_sums, sum_lines(hidden, outs), variant.width}, 0);
  py::array latent_rows = make(floats, {in_rows ? rows : 0, variant.width}, kNaN);
  py::array latent_places = make(py::dtype::of<int64_t>(), {in_rows ? rows : 0}, kNaN);
  QueryBackward gradients{};
  gradients.grad_out = read<float>(grad_out);
  gradients.latent_map = in_rows ? nullptr : write<float>(grad_latent_map);
  gradients.latent_rows = write<float>(latent_rows);
  gradients.latent_places = write<int64_t>(latent_places);
  gradients.rows = gradient_rows.mutable_data();
  gradients.sums = write<float>(sums);
  gradients.coord = last_layer ? write<float>(grad_coord) : nullptr;
  gradients.cell = grad_cell.size() > 0 ? write<float>(grad_cell) : nullptr;
  const QueryTask task = make_task(p, variant, packed.data(), is_float(latent_map), first_row, rows);
  check(launch_query_backward(task, variant, kept, gradients, nullptr));
  return py::make_tuple(gradient_rows, sums, latent_rows, latent_places);
}

}  // namespace

void bind_query(py::module_& m) {
  m.def("query_forward", &forward);
  m.def("query_backward", &backward);
  m.def("set_device", [](int processors, int block_shared_bytes, int processor_shared_bytes, int major, int minor) {
    cuda_on_cpu::device = {processors, block_shared_bytes, processor_shared_bytes, major, minor};
  });
  m.def("packed_units", [](int operands, int width) {  // (out, in) of every 16-byte unit, in their order
    std::vector<std::pair<int, int>> units;
    for (int group = 0; group < groups_of(static_cast<Operands>(operands), width); ++group)
      for (int unit = 0; unit < chunk_units(width); ++unit) {
        const PackedUnit found = packed_unit(static_cast<Operands>(operands), width, group, unit);
        units.emplace_back(found.out, found.in);
      }
    return units;
  });
}

}  // namespace liif_fast
