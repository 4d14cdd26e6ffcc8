// The fused decodes on the CPU, LIIF's and MetaSR's, and the first layer's gradient. liif_fast/ops/backends/cpu.py is
// the only caller.
#include "bindings/problems.h"
#include "cpu/dispatch.h"
#include "cpu/entry_points.h"
#include "cpu/slabs.h"

namespace liif_fast {
namespace {

// --------------------------------------------------------------------------------------------------------------- LIIF
// bf16: whether matrix products have bfloat16 operands. It changes nothing in float64.

void check_decode(const DecodeInputs& inputs, bool bf16) {
  STD_TORCH_CHECK(inputs.latent_map.is_cpu(), "latent_map must be a CPU tensor");
  STD_TORCH_CHECK(!bf16 || bf16_kernels(), "this processor has no AVX-512-BF16: multiply in float32");
}

// The slab that a tensor of bytes holds, or null if it is empty.
char* checked_slab(const Tensor& saved) {
  if (saved.numel() == 0) return nullptr;
  check_contiguous(saved, "saved", kCpu, {saved.numel()});
  STD_TORCH_CHECK(saved.scalar_type() == ScalarType::Byte, "saved has the wrong dtype");
  STD_TORCH_CHECK(slab_bytes(data<char>(saved)) <= saved.numel(), "saved is too small for what its header says");
  return data<char>(saved);
}

// [bytes of a tile, rows of a tile, bytes of the header, most bytes of a slab] for an imnet's widths: K, *hidden, O.
Sizes cpu_saved_layout(const Sizes& widths, bool float64, bool bf16) {
  const auto layout = [&](auto zero) {
    DecodeProblem<decltype(zero)> p{};
    p.layers = static_cast<int>(widths.size()) - 1;
    std::copy(widths.begin(), widths.end(), p.widths);
    p.width = widths[0];
    return saved_layout(p, bf16);
  };
  STD_TORCH_CHECK(!widths.empty() && widths.size() <= kMaxLayers + 1, "an imnet of at most ", kMaxLayers + 1,
                  " layers");
  const SavedLayout found = float64 ? layout(double{}) : layout(float{});
  return {found.tile_bytes, found.tile_rows, kSlabHeader, slab_limit()};
}

// A tensor of bytes with a slab, which the pool gets back when the last tensor on its memory is deleted.
Tensor cpu_take_slab(int64_t bytes, int64_t tile_bytes) {
  STD_TORCH_CHECK(tile_bytes > 0 && bytes >= kSlabHeader, "a slab has a header and tiles");
  return torch::stable::from_blob(take_slab(bytes, tile_bytes), {bytes}, {1}, torch::headeronly::DeviceType::CPU,
                                  ScalarType::Byte, &return_slab);
}

void cpu_set_slab_limit(int64_t bytes) { set_slab_limit(bytes); }

Tensor decode(const Tensor& latent_map, const MaybeTensor& coord, const MaybeTensor& cell,
              const Tensor& weight_geometry, const std::vector<Tensor>& weights, const std::vector<Tensor>& biases,
              const Sizes& grid, const std::vector<double>& grid_cell, bool local_ensemble,
              const MaybeTensor& query_term, bool bf16, const Tensor& saved, bool skips_corners) {
  const DecodeInputs inputs{latent_map, coord, cell,      weight_geometry, weights,
                            biases,     grid,  grid_cell, local_ensemble,  query_term};
  check_decode(inputs, bf16);
  return with_geometry(latent_map, [&](auto zero) {
    using T = decltype(zero);
    DecodeProblem<T> p = decode_problem<T>(inputs);
    const ScalarType dtype = latent_map.scalar_type();
    const bool bf16_map = bf16 && dtype == ScalarType::BFloat16;
    STD_TORCH_CHECK(bf16_map || dtype == kDtype<T>, "latent_map has the wrong dtype");
    Tensor out = empty<T>(latent_map, out_sizes(p));
    p.out = data<T>(out);
    // In double the rounding is smaller than the 1e-9 that every area has at least.
    p.skips_corners =
        skips_corners && !p.coord && grid_cell.size() == 2 && p.corners == 4 && sizeof(T) == sizeof(float);
    decode_forward(p, bf16, bf16_map, checked_slab(saved));
    return out;
  });
}

std::vector<Tensor> boxed_decode_backward(const Tensor& grad_out, const Tensor& latent_map, const MaybeTensor& coord,
                                          const MaybeTensor& cell, const Tensor& weight_geometry,
                                          const std::vector<Tensor>& weights, const std::vector<Tensor>& biases,
                                          const Sizes& grid, const std::vector<double>& grid_cell, bool local_ensemble,
                                          const MaybeTensor& query_term, bool bf16, const Tensor& saved,
                                          bool coord_grad) {
  const DecodeInputs inputs{latent_map, coord, cell,      weight_geometry, weights,
                            biases,     grid,  grid_cell, local_ensemble,  query_term};
  check_decode(inputs, bf16);
  return with_geometry(latent_map, [&](auto zero) {
    using T = decltype(zero);
    const DecodeProblem<T> p = decode_problem<T>(inputs);
    STD_TORCH_CHECK(latent_map.scalar_type() == kDtype<T>, "latent_map has the wrong dtype");
    DecodeGrads<T> grads{};
    grads.grad_out = checked<T>(grad_out, "grad_out", kCpu, out_sizes(p));
    // In the order of DecodeInputs.differentiable: latent_map, weight_geometry, weights, biases, coord, cell,
    // query_term.
    std::vector<Tensor> out;
    const auto make = [&](const Sizes& sizes) {
      out.push_back(zeros<T>(latent_map, sizes));
      return data<T>(out.back());
    };
    grads.latent_map = make({p.batch, p.region_height, p.region_width, p.width});
    grads.weight_geometry = make({p.width, p.has_cell ? 4 : 2});
    for (int layer = 0; layer < p.layers; ++layer) grads.weights[layer] = make({p.widths[layer + 1], p.widths[layer]});
    for (int layer = 0; layer <= p.layers; ++layer) grads.biases[layer] = make({p.widths[layer]});
    if (p.coord && coord_grad) grads.coord = make({p.batch, p.queries, 2});
    if (p.cell && coord_grad) grads.cell = make({p.batch, p.queries, 2});
    if (p.query_term) grads.query_term = make({p.batch, p.queries, p.width});
    decode_backward(p, grads, bf16, checked_slab(saved));
    return out;
  });
}

// The gradient of a 3x3 convolution's kernels, [outs, channels, 3, 3]; both tensors have their channels last.
Tensor cpu_kernel_grads(const Tensor& map, const Tensor& grad_out) {
  STD_TORCH_CHECK(map.dim() == 4 && grad_out.dim() == 4, "map and grad_out must have 4 dimensions");
  return with_geometry(map, [&](auto zero) {
    using T = decltype(zero);
    ConvolutionGradsProblem<T> p{};
    p.batch = map.size(0);
    p.height = map.size(1);
    p.width = map.size(2);
    p.channels = map.size(3);
    p.outs = grad_out.size(3);
    p.map = checked<T>(map, "map", kCpu, {p.batch, p.height, p.width, p.channels});
    p.grad_out = checked<T>(grad_out, "grad_out", kCpu, {p.batch, p.height, p.width, p.outs});
    Tensor out = zeros<T>(map, {p.outs, p.channels, 3, 3});
    p.grad_kernels = data<T>(out);
    kernel_grads(p);
    return out;
  });
}

// -------------------------------------------------------------------------------------------------------------- MetaSR

template <class T>
MetasrProblem<T> cpu_metasr_problem(const MetasrInputs& inputs) {
  const MetasrProblem<T> p = metasr_problem<T>(inputs);
  STD_TORCH_CHECK(inputs.latent_map.is_cpu(), "latent_map must be a CPU tensor");
  STD_TORCH_CHECK(inputs.latent_map.scalar_type() == kDtype<T>, "latent_map has the wrong dtype");
  return p;
}

Tensor metasr_query(const Tensor& latent_map, const Tensor& coord, const Tensor& cell, const Tensor& weight,
                    const Tensor& bias, const Sizes& region) {
  const MetasrInputs inputs{latent_map, coord, cell, weight, bias, region};
  return with_geometry(latent_map, [&](auto zero) {
    using T = decltype(zero);
    MetasrProblem<T> p = cpu_metasr_problem<T>(inputs);
    Tensor out = empty<T>(latent_map, {p.batch, p.queries, p.outs});
    p.out = data<T>(out);
    metasr_forward(p);
    return out;
  });
}

std::vector<Tensor> metasr_query_backward(const Tensor& grad_out, const Tensor& latent_map, const Tensor& coord,
                                          const Tensor& cell, const Tensor& weight, const Tensor& bias,
                                          const Sizes& region) {
  const MetasrInputs inputs{latent_map, coord, cell, weight, bias, region};
  return with_geometry(latent_map, [&](auto zero) {
    using T = decltype(zero);
    const MetasrProblem<T> p = cpu_metasr_problem<T>(inputs);
    // In the order of the Python side: latent_map, coord, cell, weight, bias.
    std::vector<Tensor> out{zeros<T>(latent_map, map_sizes(p)), zeros<T>(latent_map, {p.batch, p.queries, 2}),
                            zeros<T>(latent_map, {p.batch, p.queries, 2}), zeros<T>(latent_map, {p.hidden, 3}),
                            zeros<T>(latent_map, {p.hidden})};
    metasr_backward(p, {checked<T>(grad_out, "grad_out", kCpu, {p.batch, p.queries, p.outs}), data<T>(out[0]),
                        data<T>(out[1]), data<T>(out[2]), data<T>(out[3]), data<T>(out[4])});
    return out;
  });
}

}  // namespace

void register_cpu_decode(Registry& ops) {
  ops.impl("CPU", "decode", TORCH_BOX(&decode));
  ops.impl("CPU", "decode_backward", TORCH_BOX(&boxed_decode_backward));
  ops.def("cpu_saved_layout(int[] widths, bool float64, bool bf16) -> int[]");
  ops.def("cpu_take_slab(int bytes, int tile_bytes) -> Tensor");
  ops.def("cpu_set_slab_limit(int bytes) -> ()");
  ops.def("cpu_kernel_grads(Tensor map, Tensor grad_out) -> Tensor");
  ops.impl("CompositeExplicitAutograd", "cpu_saved_layout", TORCH_BOX(&cpu_saved_layout));
  ops.impl("CompositeExplicitAutograd", "cpu_take_slab", TORCH_BOX(&cpu_take_slab));
  ops.impl("CompositeExplicitAutograd", "cpu_set_slab_limit", TORCH_BOX(&cpu_set_slab_limit));
  ops.impl("CPU", "cpu_kernel_grads", TORCH_BOX(&cpu_kernel_grads));
  ops.impl("CPU", "metasr_query", TORCH_BOX(&metasr_query));
  ops.impl("CPU", "metasr_query_backward", TORCH_BOX(&metasr_query_backward));
}

}  // namespace liif_fast
