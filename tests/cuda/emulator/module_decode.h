// The fused decode's launchers on numpy arrays: the steps of csrc/bindings/cuda_decode.cpp.
#pragma once

#include "cuda/decode/launch.h"
#include "numpy_arrays.h"
#include "simt.h"

namespace liif_fast {
namespace {

bool rebuilds = true;  // operands of the weights' gradients; otherwise all are stored

// The arguments that forward and backward share, in the order of the bindings, from number `first` on; and the kernels.
struct Decode {
  DecodeProblem<float> problem;
  DecodeVariant variant;
  int hidden, outs;
  bool latent_is_float;

  static constexpr size_t kArguments = 11;

  Decode(const py::args& arguments, size_t first) {
    const auto array = [&](size_t i) { return arguments[first + i].cast<py::array>(); };
    const auto maybe = [&](size_t i) { return arguments[first + i].is_none() ? nullptr : read<float>(array(i)); };
    const py::array latent_map = array(0), weight_geometry = array(3);
    const auto weights = arguments[first + 4].cast<std::vector<py::array>>();
    const auto biases = arguments[first + 5].cast<std::vector<py::array>>();
    const auto grid = arguments[first + 6].cast<std::vector<int64_t>>();
    const auto grid_cell = arguments[first + 7].cast<std::vector<double>>();
    const bool has_coord = !arguments[first + 1].is_none();
    problem =
        make_decode_problem<float>({latent_map.shape(0), latent_map.shape(1), latent_map.shape(2), latent_map.shape(3)},
                                   has_coord ? array(1).shape(1) : 0, has_coord ? nullptr : grid.data(),
                                   grid_cell.data(), arguments[first + 8].cast<bool>(), grid_cell.size() == 6);
    problem.query_term = maybe(9);
    problem.latent_map = latent_map.data();
    problem.coord = maybe(1);
    problem.cell = maybe(2);
    problem.has_cell = weight_geometry.shape(1) == 4;
    problem.weight_geometry = read<float>(weight_geometry);
    problem.layers = static_cast<int>(weights.size());
    for (int layer = 0; layer <= problem.layers; ++layer)
      problem.biases[layer] = read<float>(biases[static_cast<size_t>(layer)]);
    int64_t widest = problem.width;
    for (int layer = 0; layer < problem.layers; ++layer) {
      problem.weights[layer] = read<float>(weights[static_cast<size_t>(layer)]);
      widest = std::max(widest, problem.widths[layer]);
      problem.widths[layer + 1] = weights[static_cast<size_t>(layer)].shape(0);
    }
    set_out_layout(problem);
    hidden = problem.layers - 1;
    const auto policy = static_cast<MmaPolicy>(arguments[first + 10].cast<int>());
    outs = fused_outs(problem);
    latent_is_float = py::isinstance<py::array_t<float>>(latent_map);
    const char* error = nullptr;
    variant =
        choose_variant(policy, static_cast<int>(widest), problem.batch * problem.queries * problem.corners, &error);
    check(error);
  }

  DecodeTask task(const py::array& packed, const RowRange& rows) const {
    if (packed.size() != packed_bytes(variant, hidden, outs)) throw std::invalid_argument("packed has a wrong size");
    return make_task(problem, variant, packed.data(), latent_is_float, rows);
  }

  SavedActivations unpack_saved(py::array saved, bool last_layer, const RowRange& rows) const {
    SavedShape shape = saved_shape(problem, variant, latent_is_float, last_layer, rows);
    if (!rebuilds) shape.first_layer = 0;
    if (saved.size() < saved_bytes(variant, shape)) throw std::invalid_argument("saved is too small");
    return saved_at(saved.mutable_data(), variant, shape);
  }
};

RowRange cast_rows(const py::args& arguments, size_t first) {
  return {arguments[first].cast<int64_t>(), arguments[first + 1].cast<int64_t>()};
}

// The shared arguments, then whether for the backward, and whether that computes gradients of coordinates.
py::array pack(const py::args& arguments) {
  const Decode decode(arguments, 0);
  py::array packed = make(py::dtype::of<uint8_t>(), {packed_bytes(decode.variant, decode.hidden, decode.outs)}, kNaN);
  const bool transposed = arguments[Decode::kArguments].cast<bool>();
  const bool points = arguments[Decode::kArguments + 1].cast<bool>();
  const Direction direction = !transposed ? Direction::kForward
                              : points    ? Direction::kBackwardWithPoints
                                          : Direction::kBackward;
  check(launch_pack(decode.problem, decode.variant, direction, packed.mutable_data(), nullptr));
  return packed;
}

// The shared arguments, then packed, saved, last_layer, first_row, rows.
py::array forward(const py::args& arguments) {
  Decode decode(arguments, 0);
  DecodeProblem<float>& p = decode.problem;
  const Shape at_coordinates{p.batch, p.queries, decode.outs},
      on_grid{p.batch, decode.outs, p.window_height, p.window_width};
  py::array out = make(py::dtype::of<float>(), p.coord ? at_coordinates : on_grid, kNaN);
  if (decode.outs) p.out = write<float>(out);
  constexpr size_t kNext = Decode::kArguments + 1;
  const py::array packed = arguments[kNext - 1].cast<py::array>();
  const py::array saved = arguments[kNext].cast<py::array>();
  const RowRange rows = cast_rows(arguments, kNext + 2);
  SavedActivations activations{};
  if (saved.size() > 0) {
    activations = decode.unpack_saved(saved, arguments[kNext + 1].cast<bool>(), rows);
  } else if (!decode.outs) {
    out = make(is_16_bit(decode.variant.policy) ? py::dtype::of<uint16_t>() : py::dtype::of<float>(),
               {rows.count / p.corners, decode.variant.width}, kNaN);
    activations.blended = out.mutable_data();
    activations.first_tile = rows.first / decode.variant.rows;
  }
  py::array workspace = make(py::dtype::of<uint8_t>(), {workspace_bytes(p, decode.variant)}, kNaN);
  check(
      launch_decode_forward(decode.task(packed, rows), decode.variant, activations, workspace.mutable_data(), nullptr));
  return out;
}

// grad_out, saved, first row and number of rows of saved, the shared arguments, packed, first_row, rows,
// grad_latent_map, grad_coord, grad_cell, grad_query_term, grad_weights.
py::tuple backward(const py::args& arguments) {
  Decode decode(arguments, 4);
  const DecodeVariant& variant = decode.variant;
  constexpr size_t kNext = 5 + Decode::kArguments;
  const py::array packed = arguments[kNext - 1].cast<py::array>();
  const RowRange rows = cast_rows(arguments, kNext);
  py::array grad_latent_map = arguments[kNext + 2].cast<py::array>();
  py::array grad_coord = arguments[kNext + 3].cast<py::array>(), grad_cell = arguments[kNext + 4].cast<py::array>();
  py::array grad_query_term = arguments[kNext + 5].cast<py::array>();
  py::array grad_weights = arguments[kNext + 6].cast<py::array>();
  const SavedActivations activations =
      decode.unpack_saved(arguments[1].cast<py::array>(), grad_coord.size() > 0, cast_rows(arguments, 2));
  const bool in_rows = grad_latent_map.size() == 0;
  const py::dtype floats = py::dtype::of<float>();
  const bool multiplies = is_16_bit(variant.policy);
  const int stored = decode.hidden - (rebuilds && rebuilds_last(variant.policy, decode.hidden, decode.outs) ? 1 : 0);
  py::array grad_rows =
      make(multiplies ? py::dtype::of<uint16_t>() : floats, {stored, rows.count, variant.width}, kNaN);
  const auto bytes = [](int64_t count) { return make(py::dtype::of<uint8_t>(), {count}, kNaN); };
  py::array row_terms = bytes((rows.count + kRowPadding) * kRowTermsBytes);
  py::array sums = make(
      floats, {int64_t{variant.blocks} * variant.row_sums, sum_count(decode.hidden, decode.outs), variant.width}, 0);
  py::array latent_rows = make(floats, {in_rows ? rows.count : 0, variant.width}, kNaN);
  py::array latent_index = make(py::dtype::of<int64_t>(), {in_rows ? rows.count : 0}, kNaN);
  BackwardArrays arrays{};
  (decode.outs ? arrays.grad_out : arrays.blended) = read<float>(arguments[0].cast<py::array>());
  arrays.latent_map = in_rows ? nullptr : write<float>(grad_latent_map);
  arrays.latent_rows = write<float>(latent_rows);
  arrays.latent_index = write<int64_t>(latent_index);
  arrays.rows = grad_rows.mutable_data();
  arrays.stored = stored;
  arrays.row_terms = multiplies ? row_terms.mutable_data() : nullptr;
  arrays.sums = write<float>(sums);
  arrays.coord = grad_coord.size() > 0 ? write<float>(grad_coord) : nullptr;
  arrays.cell = grad_cell.size() > 0 ? write<float>(grad_cell) : nullptr;
  arrays.query_term = grad_query_term.size() > 0 ? write<float>(grad_query_term) : nullptr;
  py::array workspace = bytes(workspace_bytes(decode.problem, variant));
  const DecodeTask task = decode.task(packed, rows);
  check(launch_decode_backward(task, variant, activations, arrays, workspace.mutable_data(), nullptr));
  if (multiplies) {
    py::array parts = bytes(weights_bytes(variant, decode.hidden, rows.count));
    check(launch_decode_weights(task, variant, activations, arrays, write<float>(grad_weights), parts.mutable_data(),
                                nullptr));
  }
  return py::make_tuple(grad_rows, sums, latent_rows, latent_index);
}

}  // namespace

void bind_decode(py::module_& m) {
  m.def("decode_pack", &pack);
  m.def("decode_forward", &forward);
  m.def("decode_backward", &backward);
  m.def("set_device", [](int processors, int block_shared_bytes, int processor_shared_bytes, int major, int minor) {
    cuda_on_cpu::set_device({processors, block_shared_bytes, processor_shared_bytes, major, minor});
  });
  m.def("set_rebuilds", [](bool wanted) { rebuilds = wanted; });
  m.def("packed_units", [](int policy, int width) {  // (out, in, step) of every 16-byte unit, in their order
    std::vector<std::tuple<int, int, int>> units;
    for (int group = 0; group < group_count(static_cast<MmaPolicy>(policy), width); ++group)
      for (int unit = 0; unit < chunk_units(width); ++unit) {
        const PackedUnit found = packed_unit(static_cast<MmaPolicy>(policy), width, group, unit);
        units.emplace_back(found.out, found.in, found.step);
      }
    return units;
  });
  // The numbers that the Python side repeats.
  m.attr("limits") =
      py::dict(py::arg("layers") = kMaxLayers, py::arg("width") = kMaxFusedWidth, py::arg("width_step") = kWidthStep,
               py::arg("outs") = kMaxFusedOuts, py::arg("row_padding") = kRowPadding,
               py::arg("trained_outs") = kMaxTrainedOuts, py::arg("wgmma_queries") = kMaxWgmmaQueries);
  m.def("saved_bytes", [](int policy, int widest, int hidden, bool local_ensemble, bool last_layer,
                          bool latent_is_float, int64_t rows) {
    const char* error = nullptr;
    const DecodeVariant variant = choose_variant(static_cast<MmaPolicy>(policy), widest, rows, &error);
    check(error);
    const int first_layer = rebuilds_first(variant.policy, hidden, latent_is_float, false) ? 1 : 0;
    return saved_bytes(variant, {hidden, local_ensemble ? 4 : 1, first_layer, last_layer, {0, rows}});
  });
}

}  // namespace liif_fast
