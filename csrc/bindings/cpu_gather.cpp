// gather and ensemble on the CPU. liif_fast/ops/backends/cpu.py is the only caller.
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "bindings/problems.h"
#include "cpu/entry_points.h"

namespace liif_fast {
namespace {

template <class T, class E>
std::tuple<Tensor, Tensor> run_gather(const Tensor& feat, const MaybeTensor& cell, const GatherInputs& inputs) {
  GatherProblem<T> p = gather_problem<T>(inputs, kCpu);
  check_contiguous(feat, "feat", kCpu, {p.batch, p.channels, p.height, p.width});
  p.cell = checked<T>(cell, "cell", kCpu, {p.batch, p.queries, 2});
  Tensor x = torch::stable::new_empty(feat, {p.batch, p.queries, p.corners, p.depth()});
  Tensor area_weight = empty<T>(feat, {p.batch, p.queries, p.corners});
  gather_forward(p, static_cast<const E*>(feat.const_data_ptr()), data<E>(x), data<T>(area_weight));
  return {x, area_weight};
}

std::tuple<Tensor, Tensor> gather(const Tensor& feat, const Tensor& coord, const MaybeTensor& cell, bool feat_unfold,
                                  bool local_ensemble) {
  STD_TORCH_CHECK(feat.dim() == 4, "feat must have 4 dimensions");
  const GatherInputs inputs{coord,       feat.size(1),  feat.size(2), feat.size(3), cell.has_value(),
                            feat_unfold, local_ensemble};
  switch (feat.scalar_type()) {
    case ScalarType::Double:
      return run_gather<double, double>(feat, cell, inputs);
    case ScalarType::Float:
      return run_gather<float, float>(feat, cell, inputs);
    case ScalarType::BFloat16:
      return run_gather<float, torch::headeronly::BFloat16>(feat, cell, inputs);
    case ScalarType::Half:
      return run_gather<float, torch::headeronly::Half>(feat, cell, inputs);
    default:
      STD_TORCH_CHECK(false, "feat must be float64, float32, bfloat16 or float16");
  }
}

std::tuple<Tensor, Tensor, Tensor> boxed_gather_backward(const Tensor& grad_x, const Tensor& grad_area_weight,
                                                         const Tensor& coord, int64_t channels, int64_t height,
                                                         int64_t width, bool has_cell, bool feat_unfold,
                                                         bool local_ensemble) {
  return with_geometry(coord, [&](auto zero) {
    using T = decltype(zero);
    const GatherProblem<T> p =
        gather_problem<T>({coord, channels, height, width, has_cell, feat_unfold, local_ensemble}, kCpu);
    Tensor grad_feat = zeros<T>(coord, {p.batch, p.channels, p.height, p.width});
    Tensor grad_coord = empty<T>(coord, {p.batch, p.queries, 2});
    Tensor grad_cell = empty<T>(coord, p.has_cell ? Sizes{p.batch, p.queries, 2} : Sizes{0});
    gather_backward(p, {checked<T>(grad_x, "grad_x", kCpu, {p.batch, p.queries, p.corners, p.depth()}),
                        checked<T>(grad_area_weight, "grad_area_weight", kCpu, {p.batch, p.queries, p.corners}),
                        data<T>(grad_feat), data<T>(grad_coord), p.has_cell ? data<T>(grad_cell) : nullptr});
    return std::make_tuple(grad_feat, grad_coord, grad_cell);
  });
}

Tensor ensemble(const Tensor& pred, const Tensor& area_weight) {
  return with_geometry(pred, [&](auto zero) {
    using T = decltype(zero);
    const EnsembleProblem<T> p = ensemble_problem<T>(pred, area_weight, kCpu);
    STD_TORCH_CHECK(pred.scalar_type() == kDtype<T>, "pred has the wrong dtype");
    Tensor out = empty<T>(pred, {pred.size(0), pred.size(1), p.outs});
    ensemble_forward(p, data<T>(out));
    return out;
  });
}

std::tuple<Tensor, Tensor> boxed_ensemble_backward(const Tensor& grad_out, const Tensor& pred,
                                                   const Tensor& area_weight) {
  return with_geometry(pred, [&](auto zero) {
    using T = decltype(zero);
    const EnsembleProblem<T> p = ensemble_problem<T>(pred, area_weight, kCpu);
    STD_TORCH_CHECK(pred.scalar_type() == kDtype<T>, "pred has the wrong dtype");
    const int64_t batch = pred.size(0), queries = pred.size(1);
    Tensor grad_pred = empty<T>(pred, {batch, queries, p.corners, p.outs});
    Tensor grad_area_weight = empty<T>(pred, {batch, queries, p.corners});
    ensemble_backward(p, {checked<T>(grad_out, "grad_out", kCpu, {batch, queries, p.outs}), data<T>(grad_pred),
                          data<T>(grad_area_weight)});
    return std::make_tuple(grad_pred, grad_area_weight);
  });
}

}  // namespace

void register_cpu_gather(Registry& ops) {
  ops.impl("CPU", "gather", TORCH_BOX(&gather));
  ops.impl("CPU", "gather_backward", TORCH_BOX(&boxed_gather_backward));
  ops.impl("CPU", "ensemble", TORCH_BOX(&ensemble));
  ops.impl("CPU", "ensemble_backward", TORCH_BOX(&boxed_ensemble_backward));
}

}  // namespace liif_fast
