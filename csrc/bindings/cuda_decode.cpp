// The fused decode on a GPU: checks, workspaces, launches.
#ifdef LIIF_FAST_WITH_CUDA
#include <algorithm>

#include "bindings/cuda.h"
#include "cuda/decode/launch.h"

namespace liif_fast {
namespace {

// A problem on a GPU, and the kernels that run it there.
struct CudaDecode {
  int32_t device;
  DecodeProblem<float> problem;
  DecodeVariant variant;
  int hidden, outs;
  bool latent_is_float;
};

MmaPolicy to_policy(int64_t number) {
  STD_TORCH_CHECK(
      number >= 0 && number <= 5,
      "policy must be 0 (float16), 1 (bfloat16), 2 (tf32), 3 (float32), or by wgmma 4 (float16), 5 (bfloat16)");
  return static_cast<MmaPolicy>(number);
}

CudaDecode cuda_decode(const DecodeInputs& inputs, int64_t policy_number) {
  STD_TORCH_CHECK(inputs.latent_map.is_cuda(), "latent_map must be a CUDA tensor");
  CudaDecode c{};
  c.device = inputs.latent_map.get_device_index();
  c.problem = decode_problem<float>(inputs);
  const DecodeProblem<float>& p = c.problem;
  c.hidden = p.layers - 1;
  STD_TORCH_CHECK(p.layers > 0, "the fused decode has a layer after the first");
  int64_t widest = 0;
  for (int layer = 0; layer < p.layers; ++layer) {
    STD_TORCH_CHECK(p.widths[layer] % kWidthStep == 0 && p.widths[layer] <= kMaxFusedWidth,
                    "the fused decode takes widths that are multiples of ", kWidthStep, " up to ", kMaxFusedWidth,
                    ", not ", p.widths[layer]);
    widest = std::max(widest, p.widths[layer]);
  }
  const MmaPolicy policy = to_policy(policy_number);
  c.outs = fused_outs(p);
  const ScalarType dtype = inputs.latent_map.scalar_type();
  const ScalarType narrow = is_float16(policy) ? ScalarType::Half : ScalarType::BFloat16;
  c.latent_is_float = dtype == ScalarType::Float;
  STD_TORCH_CHECK(c.latent_is_float || (is_16_bit(policy) && dtype == narrow),
                  "latent_map must be float32 or in the operands' 16 bits");
  STD_TORCH_CHECK(
      !is_wgmma(policy) || (c.outs > 0 && c.hidden >= 1 && p.batch * p.queries <= kMaxWgmmaQueries && !p.query_term),
      "the wgmma kernels take up to ", kMaxFusedOuts, " outputs, at least 1 hidden layer after the first, up to ",
      kMaxWgmmaQueries, " queries and no query term");
  const char* error = nullptr;
  const DeviceGuard guard(c.device);
  c.variant = choose_variant(policy, static_cast<int>(widest), p.batch * p.queries * p.corners, &error);
  check_launch(error);
  return c;
}

ScalarType operand_dtype(MmaPolicy policy) {
  if (!is_16_bit(policy)) return ScalarType::Float;
  return is_float16(policy) ? ScalarType::Half : ScalarType::BFloat16;
}

// The packed weights of one direction: of the forward, or transposed for the backward. They do not depend on the
// queries.
Tensor pack(const Tensor& latent_map, const MaybeTensor& coord, const MaybeTensor& cell, const Tensor& weight_geometry,
            const std::vector<Tensor>& weights, const std::vector<Tensor>& biases, const Sizes& grid,
            const std::vector<double>& grid_cell, bool local_ensemble, const MaybeTensor& query_term, int64_t policy,
            bool transposed, bool points) {
  const CudaDecode c = cuda_decode(
      {latent_map, coord, cell, weight_geometry, weights, biases, grid, grid_cell, local_ensemble, query_term}, policy);
  const DeviceGuard guard(c.device);
  Tensor packed = torch::stable::new_empty(latent_map, {packed_bytes(c.variant, c.hidden, c.outs)}, ScalarType::Byte);
  const Direction direction = !transposed ? Direction::kForward
                              : points    ? Direction::kBackwardWithPoints
                                          : Direction::kBackward;
  check_launch(launch_pack(c.problem, c.variant, direction, packed.mutable_data_ptr(), current_stream(c.device)));
  return packed;
}

DecodeTask make_task(const CudaDecode& c, const Tensor& packed, const RowRange& rows) {
  check_contiguous(packed, "packed", c.device, {packed_bytes(c.variant, c.hidden, c.outs)});
  STD_TORCH_CHECK(packed.scalar_type() == ScalarType::Byte, "packed has the wrong dtype");
  return make_task(c.problem, c.variant, packed.const_data_ptr(), c.latent_is_float, rows);
}

void check_rows(const RowRange& rows) {
  STD_TORCH_CHECK(rows.first >= 0 && rows.count >= 0 && rows.first % kRowPadding == 0 && rows.count % kRowPadding == 0,
                  "rows come in multiples of ", kRowPadding);
}

SavedActivations unpack_saved(const CudaDecode& c, const Tensor& saved, bool last_layer, const RowRange& rows) {
  check_rows(rows);
  check_contiguous(saved, "saved", c.device, {saved.size(0)});
  const SavedShape shape = saved_shape(c.problem, c.variant, c.latent_is_float, last_layer, rows);
  STD_TORCH_CHECK(saved.scalar_type() == ScalarType::Byte && saved.size(0) >= saved_bytes(c.variant, shape),
                  "saved is too small");
  return saved_at(saved.mutable_data_ptr(), c.variant, shape);
}

// The whole output, or with `saved` the activations that the backward needs of rows [first_row, first_row + rows). More
// outputs than fused ones are the caller's: the result is the rows' blended hidden vectors [rows / corners, padded
// width] in the operands' dtype, unless they are saved.
Tensor decode(const Tensor& latent_map, const MaybeTensor& coord, const MaybeTensor& cell,
              const Tensor& weight_geometry, const std::vector<Tensor>& weights, const std::vector<Tensor>& biases,
              const Sizes& grid, const std::vector<double>& grid_cell, bool local_ensemble,
              const MaybeTensor& query_term, int64_t policy, const Tensor& packed, const Tensor& saved, bool last_layer,
              int64_t first_row, int64_t rows, bool with_out) {
  CudaDecode c = cuda_decode(
      {latent_map, coord, cell, weight_geometry, weights, biases, grid, grid_cell, local_ensemble, query_term}, policy);
  const DeviceGuard guard(c.device);
  Tensor out = torch::stable::new_empty(latent_map,
                                        !with_out ? Sizes{0}
                                        : c.outs  ? out_sizes(c.problem)
                                                  : Sizes{rows / c.problem.corners, c.variant.width},
                                        c.outs ? ScalarType::Float : operand_dtype(c.variant.policy));
  if (with_out && c.outs) c.problem.out = data<float>(out);
  if (c.problem.batch * c.problem.queries == 0) return out;
  const RowRange range{first_row, rows};
  SavedActivations activations{};
  if (saved.numel() > 0) {
    activations = unpack_saved(c, saved, last_layer, range);
  } else if (with_out && !c.outs) {
    check_rows(range);
    activations.blended = out.mutable_data_ptr();
    activations.first_tile = range.first / c.variant.rows;
  }
  Tensor workspace = torch::stable::new_empty(latent_map, {workspace_bytes(c.problem, c.variant)}, ScalarType::Byte);
  check_launch(launch_decode_forward(make_task(c, packed, range), c.variant, activations, workspace.mutable_data_ptr(),
                                     current_stream(c.device)));
  return out;
}

// The tensors that a backward writes or adds to. Empty where no gradient is wanted; latent_map: in the fixed order.
// weights: left as they are with float32 operands.
struct OutputGrads {
  const Tensor &latent_map, &coord, &cell, &query_term, &weights;
};

std::vector<Tensor> run_backward(const CudaDecode& c, const Tensor& packed, const Tensor& grad_out,
                                 const SavedActivations& saved, const RowRange& rows, const OutputGrads& grads) {
  const DecodeProblem<float>& p = c.problem;
  const DeviceGuard guard(c.device);
  const bool in_rows = grads.latent_map.numel() == 0;
  const bool multiplies = is_16_bit(c.variant.policy);
  const int stored = rebuilds_last(c.variant.policy, c.hidden, c.outs) ? c.hidden - 1 : c.hidden;
  const int64_t width = c.variant.width, latent_rows = in_rows ? rows.count : 0;
  const auto bytes = [&](int64_t count) { return torch::stable::new_empty(grad_out, {count}, ScalarType::Byte); };
  std::vector<Tensor> out{
      torch::stable::new_empty(grad_out, {stored, rows.count, width}, operand_dtype(c.variant.policy)),
      zeros<float>(grad_out, {int64_t{c.variant.blocks} * c.variant.row_sums, sum_count(c.hidden, c.outs), width}),
      empty<float>(grad_out, {latent_rows, width}),
      torch::stable::new_empty(grad_out, {latent_rows}, ScalarType::Long)};
  const auto written = [&](const Tensor& tensor, const char* name, const Sizes& sizes) {
    return tensor.numel() > 0 ? const_cast<float*>(checked<float>(tensor, name, c.device, sizes)) : nullptr;
  };
  BackwardArrays backward{};
  const Sizes blended{rows.count / p.corners, width};
  const float* const out_grads = checked<float>(grad_out, "grad_out", c.device, c.outs ? out_sizes(p) : blended);
  (c.outs ? backward.grad_out : backward.blended) = out_grads;
  backward.latent_map =
      written(grads.latent_map, "grad_latent_map", {p.batch, p.region_height, p.region_width, p.width});
  backward.rows = out[0].mutable_data_ptr();
  backward.stored = stored;
  Tensor row_terms = bytes(multiplies ? (rows.count + kRowPadding) * kRowTermsBytes : 0);
  if (multiplies) backward.row_terms = row_terms.mutable_data_ptr();
  backward.sums = data<float>(out[1]);
  backward.latent_rows = data<float>(out[2]);
  backward.latent_index = data<int64_t>(out[3]);
  backward.coord = written(grads.coord, "grad_coord", {p.batch, p.queries, 2});
  backward.cell = written(grads.cell, "grad_cell", {p.batch, p.queries, 2});
  backward.query_term = written(grads.query_term, "grad_query_term", {p.batch, p.queries, p.width});
  const DecodeTask task = make_task(c, packed, rows);
  Tensor workspace = bytes(workspace_bytes(p, c.variant));
  void* const stream = current_stream(c.device);
  check_launch(launch_decode_backward(task, c.variant, saved, backward, workspace.mutable_data_ptr(), stream));
  if (!multiplies) return out;
  float* const weights = written(grads.weights, "grad_weights", {c.hidden, width, width});
  Tensor parts = bytes(weights_bytes(c.variant, c.hidden, rows.count));
  check_launch(launch_decode_weights(task, c.variant, saved, backward, weights, parts.mutable_data_ptr(), stream));
  return out;
}

// grad_out: without fused outputs those of the rows' blended hidden vectors [rows / corners, padded width].
// Of rows [first_row, first_row + rows): gradients before every hidden ReLU [hidden, rows, padded width] (with 16 bits
// grad_weights is added to instead: the hidden layers' products [hidden, padded width, padded width]), partial sums
// [blocks * row_sums, sum_count, padded width], and with an empty grad_latent_map the latents' gradients row by row
// [rows, padded width] and each row's latent [rows]. grad_latent_map is added to, the other gradients are written.
std::vector<Tensor> decode_backward(const Tensor& grad_out, const Tensor& saved, int64_t saved_first_row,
                                    int64_t saved_rows, const Tensor& latent_map, const MaybeTensor& coord,
                                    const MaybeTensor& cell, const Tensor& weight_geometry,
                                    const std::vector<Tensor>& weights, const std::vector<Tensor>& biases,
                                    const Sizes& grid, const std::vector<double>& grid_cell, bool local_ensemble,
                                    const MaybeTensor& query_term, int64_t policy, const Tensor& packed,
                                    int64_t first_row, int64_t rows, const Tensor& grad_latent_map,
                                    const Tensor& grad_coord, const Tensor& grad_cell, const Tensor& grad_query_term,
                                    const Tensor& grad_weights) {
  const CudaDecode c = cuda_decode(
      {latent_map, coord, cell, weight_geometry, weights, biases, grid, grid_cell, local_ensemble, query_term}, policy);
  check_rows({first_row, rows});
  STD_TORCH_CHECK(first_row >= saved_first_row && first_row + rows <= saved_first_row + saved_rows,
                  "saved does not hold these rows");
  const SavedActivations activations = unpack_saved(c, saved, grad_coord.numel() > 0, {saved_first_row, saved_rows});
  return run_backward(c, packed, grad_out, activations, {first_row, rows},
                      {grad_latent_map, grad_coord, grad_cell, grad_query_term, grad_weights});
}

}  // namespace

void register_cuda_decode(Registry& ops) {
  ops.def(
      "cuda_decode_pack(Tensor latent_map, Tensor? coord, Tensor? cell, Tensor weight_geometry, Tensor[] weights, "
      "Tensor[] biases, int[] grid, float[] grid_cell, bool local_ensemble, Tensor? query_term, int policy, bool "
      "transposed, bool points) -> Tensor");
  ops.def(
      "cuda_decode(Tensor latent_map, Tensor? coord, Tensor? cell, Tensor weight_geometry, Tensor[] weights, "
      "Tensor[] biases, int[] grid, float[] grid_cell, bool local_ensemble, Tensor? query_term, int policy, "
      "Tensor packed, Tensor(a!) saved, bool last_layer, int first_row, int rows, bool with_out) -> Tensor");
  ops.def(
      "cuda_decode_backward(Tensor grad_out, Tensor saved, int saved_first_row, int saved_rows, Tensor latent_map, "
      "Tensor? coord, Tensor? cell, Tensor weight_geometry, Tensor[] weights, Tensor[] biases, int[] grid, "
      "float[] grid_cell, bool local_ensemble, Tensor? query_term, int policy, Tensor packed, int first_row, int rows, "
      "Tensor(a!) grad_latent_map, Tensor(b!) grad_coord, Tensor(c!) grad_cell, Tensor(d!) grad_query_term, "
      "Tensor(e!) grad_weights) -> Tensor[]");
  ops.impl("CUDA", "cuda_decode_pack", TORCH_BOX(&pack));
  ops.impl("CUDA", "cuda_decode", TORCH_BOX(&decode));
  ops.impl("CUDA", "cuda_decode_backward", TORCH_BOX(&decode_backward));
}

}  // namespace liif_fast
#endif
