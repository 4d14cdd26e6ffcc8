// The fused decode's CUDA bindings: checks, workspaces, launches. liif_fast/ops/backends/cuda/ is the only caller.
#ifdef LIIF_FAST_WITH_CUDA
#include <algorithm>

#include "bindings/cuda.h"
#include "bindings/decode_problem.h"
#include "cuda/decode/variant.h"

namespace liif_fast {
namespace {

// A problem on a GPU, and the kernels that run it there.
struct CudaProblem {
  int32_t device;
  QueryProblem<float> problem;
  QueryVariant variant;
  int hidden, outs;
  bool latent_is_float;
};

Operands operands_of(int64_t number) {
  STD_TORCH_CHECK(number >= 0 && number <= 3, "operands must be 0 (float16), 1 (bfloat16), 2 (tf32) or 3 (float32)");
  return static_cast<Operands>(number);
}

CudaProblem cuda_problem(const Tensor& latent_map, const MaybeTensor& coord, const MaybeTensor& cell,
                         const Tensor& weight_geometry, const std::vector<Tensor>& weights,
                         const std::vector<Tensor>& biases, const Sizes& grid, const std::vector<double>& grid_cell,
                         bool local_ensemble, int64_t operands) {
  STD_TORCH_CHECK(latent_map.is_cuda(), "latent_map must be a CUDA tensor");
  CudaProblem c{};
  c.device = latent_map.get_device_index();
  const auto on_gpu = [&](const Tensor& tensor, const char* name, const Sizes& sizes) {
    static const float nothing = 0;  // an empty tensor's own pointer is null, and null means that there is no tensor
    const float* values = checked<float>(tensor, name, c.device, sizes);
    return values ? values : &nothing;
  };
  c.problem = query_problem<float>(latent_map, coord, cell, weight_geometry, weights, biases, grid, grid_cell,
                                   local_ensemble, on_gpu);
  const QueryProblem<float>& p = c.problem;
  c.hidden = p.layers - 1;
  STD_TORCH_CHECK(p.layers > 0 && p.out_width() <= kMaxFusedOuts, "the fused decode has a last layer of at most ",
                  kMaxFusedOuts, " outputs");
  int64_t widest = 0;
  for (int layer = 0; layer < p.layers; ++layer) {
    STD_TORCH_CHECK(p.widths[layer] % kWidthStep == 0 && p.widths[layer] <= kMaxFusedWidth,
                    "the fused decode takes widths that are multiples of ", kWidthStep, " up to ", kMaxFusedWidth,
                    ", not ", p.widths[layer]);
    widest = std::max(widest, p.widths[layer]);
  }
  c.outs = static_cast<int>(p.out_width());
  const Operands kind = operands_of(operands);
  c.latent_is_float = latent_map.scalar_type() == ScalarType::Float;
  const ScalarType narrow = kind == Operands::kFloat16 ? ScalarType::Half : ScalarType::BFloat16;
  STD_TORCH_CHECK(c.latent_is_float || (operand_bytes(kind) == 2 && latent_map.scalar_type() == narrow),
                  "latent_map must be float32 or in the operands' 16 bits");
  const char* error = nullptr;
  const DeviceGuard guard(c.device);
  c.variant = choose_variant(kind, static_cast<int>(widest), &error);
  check_launch(error);
  return c;
}

Tensor bytes(const Tensor& like, int64_t size) { return torch::stable::new_empty(like, {size}, ScalarType::Byte); }

// Rows [first, first + count) of the problem, whole paddings of them.
void check_rows(int64_t first, int64_t count) {
  STD_TORCH_CHECK(first >= 0 && count >= 0 && first % kRowPadding == 0 && count % kRowPadding == 0,
                  "rows come in multiples of ", kRowPadding);
}

Saved saved_of(const CudaProblem& c, const Tensor& saved, bool last_layer, int64_t first_row, int64_t rows) {
  check_rows(first_row, rows);
  const int corners = c.problem.corners;
  check_contiguous(saved, "saved", c.device, {saved.size(0)});
  STD_TORCH_CHECK(saved.scalar_type() == ScalarType::Byte &&
                      saved.size(0) >= saved_bytes(c.variant, c.hidden, corners, last_layer, rows),
                  "saved is too small");
  return saved_at(saved.mutable_data_ptr(), c.variant, c.hidden, corners, last_layer, first_row, rows);
}

// The whole output, or with `saved` what the backward needs of rows [first_row, first_row + rows).
Tensor query(const Tensor& latent_map, const MaybeTensor& coord, const MaybeTensor& cell, const Tensor& weight_geometry,
             const std::vector<Tensor>& weights, const std::vector<Tensor>& biases, const Sizes& grid,
             const std::vector<double>& grid_cell, bool local_ensemble, int64_t operands, const Tensor& saved,
             bool last_layer, int64_t first_row, int64_t rows, bool with_out) {
  CudaProblem c = cuda_problem(latent_map, coord, cell, weight_geometry, weights, biases, grid, grid_cell,
                               local_ensemble, operands);
  const DeviceGuard guard(c.device);
  Tensor out = empty<float>(latent_map, with_out ? out_sizes(c.problem) : Sizes{0});
  c.problem.out = with_out ? data<float>(out) : nullptr;
  if (c.problem.batch * c.problem.queries == 0) return out;
  void* const stream = current_stream(c.device);
  Tensor packed = bytes(latent_map, packed_bytes(c.variant, c.hidden, c.outs));
  check_launch(launch_pack(c.problem, c.variant, false, packed.mutable_data_ptr(), stream));
  Saved kept{};
  if (saved.numel() > 0) kept = saved_of(c, saved, last_layer, first_row, rows);
  const QueryTask task = make_task(c.problem, c.variant, packed.const_data_ptr(), c.latent_is_float, first_row, rows);
  check_launch(launch_query_forward(task, c.variant, kept, stream));
  return out;
}

// Of rows [first_row, first_row + rows): gradients before every hidden ReLU [hidden, rows, padded width], partial sums
// [parts, lines, padded width], and with an empty grad_latent_map the latents' gradients row by row [rows, padded
// width] with their places in the map [rows]. grad_latent_map is added to; grad_coord and grad_cell are written, or
// empty where nobody asks.
std::vector<Tensor> query_backward(const Tensor& grad_out, const Tensor& saved, int64_t saved_first_row,
                                   int64_t saved_rows, const Tensor& latent_map, const MaybeTensor& coord,
                                   const MaybeTensor& cell, const Tensor& weight_geometry,
                                   const std::vector<Tensor>& weights, const std::vector<Tensor>& biases,
                                   const Sizes& grid, const std::vector<double>& grid_cell, bool local_ensemble,
                                   int64_t operands, int64_t first_row, int64_t rows, const Tensor& grad_latent_map,
                                   const Tensor& grad_coord, const Tensor& grad_cell) {
  const CudaProblem c = cuda_problem(latent_map, coord, cell, weight_geometry, weights, biases, grid, grid_cell,
                                     local_ensemble, operands);
  const QueryProblem<float>& p = c.problem;
  const DeviceGuard guard(c.device);
  check_rows(first_row, rows);
  STD_TORCH_CHECK(first_row >= saved_first_row && first_row + rows <= saved_first_row + saved_rows,
                  "saved does not hold these rows");
  const bool in_rows = grad_latent_map.numel() == 0, last_layer = grad_coord.numel() > 0;
  const Saved kept = saved_of(c, saved, last_layer, saved_first_row, saved_rows);
  const int64_t width = c.variant.width;
  std::vector<Tensor> out{
      torch::stable::new_empty(latent_map, {c.hidden, rows, width},
                               operand_bytes(c.variant.operands) == 4     ? ScalarType::Float
                               : c.variant.operands == Operands::kFloat16 ? ScalarType::Half
                                                                          : ScalarType::BFloat16),
      zeros<float>(latent_map, {int64_t{c.variant.blocks} * c.variant.row_sums, sum_lines(c.hidden, c.outs), width}),
      empty<float>(latent_map, {in_rows ? rows : 0, width}),
      torch::stable::new_empty(latent_map, {in_rows ? rows : 0}, ScalarType::Long)};
  QueryBackward gradients{};
  gradients.grad_out = checked<float>(grad_out, "grad_out", c.device, out_sizes(p));
  if (!in_rows)
    gradients.latent_map = const_cast<float*>(checked<float>(grad_latent_map, "grad_latent_map", c.device,
                                                             {p.batch, p.region_height, p.region_width, p.width}));
  gradients.rows = out[0].mutable_data_ptr();
  gradients.sums = data<float>(out[1]);
  gradients.latent_rows = data<float>(out[2]);
  gradients.latent_places = data<int64_t>(out[3]);
  if (last_layer)
    gradients.coord = const_cast<float*>(checked<float>(grad_coord, "grad_coord", c.device, {p.batch, p.queries, 2}));
  if (grad_cell.numel() > 0)
    gradients.cell = const_cast<float*>(checked<float>(grad_cell, "grad_cell", c.device, {p.batch, p.queries, 2}));
  void* const stream = current_stream(c.device);
  Tensor packed = bytes(latent_map, packed_bytes(c.variant, c.hidden, c.outs));
  check_launch(launch_pack(p, c.variant, true, packed.mutable_data_ptr(), stream));
  const QueryTask task = make_task(p, c.variant, packed.const_data_ptr(), c.latent_is_float, first_row, rows);
  check_launch(launch_query_backward(task, c.variant, kept, gradients, stream));
  return out;
}

}  // namespace
}  // namespace liif_fast

STABLE_TORCH_LIBRARY_FRAGMENT(liif_fast_C, m) {
  m.def(
      "cuda_decode(Tensor latent_map, Tensor? coord, Tensor? cell, Tensor weight_geometry, Tensor[] weights, "
      "Tensor[] biases, int[] grid, float[] grid_cell, bool local_ensemble, int operands, Tensor(a!) saved, "
      "bool last_layer, int first_row, int rows, bool with_out) -> Tensor");
  m.def(
      "cuda_decode_backward(Tensor grad_out, Tensor saved, int saved_first_row, int saved_rows, Tensor latent_map, "
      "Tensor? coord, Tensor? cell, Tensor weight_geometry, Tensor[] weights, Tensor[] biases, int[] grid, "
      "float[] grid_cell, bool local_ensemble, int operands, int first_row, int rows, Tensor(a!) grad_latent_map, "
      "Tensor(b!) grad_coord, Tensor(c!) grad_cell) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(liif_fast_C, CUDA, m) {
  m.impl("cuda_decode", TORCH_BOX(&liif_fast::query));
  m.impl("cuda_decode_backward", TORCH_BOX(&liif_fast::query_backward));
}
#endif
