// One decode of 256 channels, forward and backward, as seeds.h runs it.
// With HOPPER, 256 or 128: the Hopper kernel's inference with as many channels, in a cluster of two blocks of several
// tiles. With 128 more layers than the ring has stages. With TRAINS too: its training, forward and backward.
#include "seeds.h"

#ifdef HOPPER
#include "cuda/decode/hopper.cuh"
#else
#include "cuda/decode/backward.cuh"
#include "cuda/decode/forward.cuh"
#include "cuda/decode/neighbors.cuh"
#endif

namespace liif_fast {

// decode.cu names them; the kernels here are launched without it.
#define LIIF_UNUSED(policy)                                                                                        \
  template <>                                                                                                      \
  const char* launch_forward<MmaPolicy::policy>(const DecodeTask&, const DecodeVariant&, const SavedActivations&,  \
                                                void*) {                                                           \
    return #policy;                                                                                                \
  }                                                                                                                \
  template <>                                                                                                      \
  const char* launch_backward<MmaPolicy::policy>(const DecodeTask&, const DecodeVariant&, const SavedActivations&, \
                                                 const BackwardArrays&, void*) {                                   \
    return #policy;                                                                                                \
  }                                                                                                                \
  template <>                                                                                                      \
  const char* launch_weights<MmaPolicy::policy>(const DecodeTask&, const DecodeVariant&, const SavedActivations&,  \
                                                const BackwardArrays&, const WeightParts&, void*) {                \
    return #policy;                                                                                                \
  }
#define LIIF_HOPPER(policy, forward, backward)                                                         \
  template <>                                                                                          \
  const char* launch_hopper<MmaPolicy::policy>([[maybe_unused]] const HopperTask& task,                \
                                               [[maybe_unused]] void* stream) {                        \
    return forward;                                                                                    \
  }                                                                                                    \
  template <>                                                                                          \
  const char* launch_hopper_backward<MmaPolicy::policy>([[maybe_unused]] const HopperTask& task,       \
                                                        [[maybe_unused]] const BackwardArrays& arrays, \
                                                        [[maybe_unused]] void* stream) {               \
    return backward;                                                                                   \
  }
#if defined(TRAINS)
using Trained = HopperSavingTile<HopperTile<__nv_bfloat16, 4, 4, 0>>;
LIIF_HOPPER(kWgmmaBFloat16, launch_tile<Trained>(task, stream), launch_backward_tile<Trained>(task, arrays, stream))
#elif defined(HOPPER)
using Inferred =
    std::conditional_t<HOPPER == 256, HopperTile<__nv_bfloat16, 4, 3, 3>, HopperTile<__nv_bfloat16, 4, 4, 0, 128>>;
LIIF_HOPPER(kWgmmaBFloat16, launch_tile<Inferred>(task, stream), "unused")
#else
LIIF_HOPPER(kWgmmaBFloat16, "unused", "unused")
#endif
LIIF_HOPPER(kWgmmaFloat16, "unused", "unused")
LIIF_UNUSED(kFloat16)
LIIF_UNUSED(kBFloat16)
LIIF_UNUSED(kTf32)
LIIF_UNUSED(kFloat32)

namespace {

#ifdef HOPPER
#ifdef TRAINS
constexpr int64_t kHidden = 2, kQueries = 90, kWidth = HOPPER;
#else
constexpr int64_t kHidden = HOPPER == 256 ? 3 : 5, kQueries = 150, kWidth = HOPPER;
#endif
#else
constexpr int64_t kHidden = 2, kQueries = 40, kWidth = 256;
#endif
constexpr int64_t kOuts = 3, kSide = 5;

uint64_t run() {
  std::mt19937 generator(3);
  const auto random_floats = [&](int64_t count, float scale) {
    std::vector<float> values(static_cast<size_t>(count));
    for (float& value : values) value = scale * (static_cast<float>(generator() % 2001) / 1000.0f - 1.0f);
    return values;
  };
  const auto latent_map = random_floats(kSide * kSide * kWidth, 1), coord = random_floats(kQueries * 2, 1),
             geometry = random_floats(kWidth * 2, 0.5f), weights = random_floats((kHidden + 1) * kWidth * kWidth, 0.1f),
             biases = random_floats(kWidth, 0.1f);
  const int64_t sizes[4] = {1, kSide, kSide, kWidth};
  DecodeProblem<float> problem = make_decode_problem<float>(sizes, kQueries, nullptr, nullptr, true);
  problem.latent_map = latent_map.data();
  problem.coord = coord.data();
  problem.weight_geometry = geometry.data();
  problem.layers = kHidden + 1;
  for (int layer = 0; layer <= problem.layers; ++layer) problem.biases[layer] = biases.data();
  for (int layer = 0; layer < problem.layers; ++layer) {
    problem.weights[layer] = weights.data() + layer * kWidth * kWidth;
    problem.widths[layer + 1] = layer + 1 < problem.layers ? kWidth : kOuts;
  }
  set_out_layout(problem);
  std::vector<float> out(kQueries * kOuts);
  problem.out = out.data();
  uint64_t hash = 14695981039346656037u;
#if defined(HOPPER) && !defined(TRAINS)
  constexpr int64_t kRows = -1;
#else
  constexpr int64_t kRows = (kQueries * 4 + kRowPadding - 1) / kRowPadding * kRowPadding;
#endif
#ifdef HOPPER
  const char* error = nullptr;
  const DecodeVariant variant = choose_variant(MmaPolicy::kWgmmaBFloat16, kWidth, kQueries * 4, &error);
  check(error);
  constexpr bool kPoints = false;
#else
  using Probe = Tile<MmaPolicy::kBFloat16, 256, 64>;  // a ring of three stages: the least slack
  const DecodeVariant variant{MmaPolicy::kBFloat16, kWidth, Probe::kRows, 1, Probe::kWarpRows};
  constexpr bool kPoints = true;
#endif
  std::vector<uint4> packed(static_cast<size_t>(packed_bytes(variant, kHidden, kOuts) / 16));
  std::vector<uint4> workspace(static_cast<size_t>(workspace_bytes(problem, variant) / 16));
  const auto task = [&](Direction direction) {
    check(launch_pack(problem, variant, direction, packed.data(), nullptr));
    return make_task(problem, variant, packed.data(), true, {0, kRows});
  };
#if defined(HOPPER) && !defined(TRAINS)
  check(launch_decode_forward(task(Direction::kForward), variant, {}, workspace.data(), nullptr));
  add_to_hash(hash, out);
#else
  const auto grad_out = random_floats(kQueries * kOuts, 1);
  const SavedShape shape{kHidden, 4, 0, kPoints, {0, kRows}};
  std::vector<unsigned char> row_terms((kRows + kRowPadding) * kRowTermsBytes);
  std::vector<uint32_t> saved(static_cast<size_t>(saved_bytes(variant, shape) / 4 + kRows * kWidth));  // and more
  std::vector<float> latent_rows(kRows * kWidth), grad_coord(kQueries * 2);
  std::vector<uint16_t> rows(kHidden * kRows * kWidth);
  std::vector<float> sums(static_cast<size_t>(variant.blocks * variant.row_sums * sum_count(kHidden, kOuts)) * kWidth);
  std::vector<int64_t> latent_index(kRows);
  const SavedActivations activations = saved_at(saved.data(), variant, shape);
  BackwardArrays arrays{};
  arrays.grad_out = grad_out.data();
  arrays.latent_rows = latent_rows.data();
  arrays.latent_index = latent_index.data();
  arrays.rows = rows.data();
  arrays.stored = kHidden;
  arrays.row_terms = row_terms.data();
  arrays.sums = sums.data();
#ifdef HOPPER
  check(launch_decode_forward(task(Direction::kForward), variant, activations, workspace.data(), nullptr));
  check(launch_decode_backward(task(Direction::kBackward), variant, activations, arrays, workspace.data(), nullptr));
  add_to_hash(hash, latent_index);
#else
  arrays.coord = grad_coord.data();
  constexpr int kBytes = sizeof(Workspace<Probe>);
  check(launch(decode_forward_kernel<Probe, true>, LaunchSize{1, forward_bytes<Probe>(kOuts)}, nullptr,
               task(Direction::kForward), activations));
  check(launch(decode_backward_kernel<Probe>,
               LaunchSize{1, kBytes + Probe::kRows / 4 * static_cast<int>(kOuts) * 4 + row_dots_bytes<Probe>()},
               nullptr, task(Direction::kBackwardWithPoints), activations, arrays));
#endif
  for (const auto* values : {&out, &latent_rows, &sums, &grad_coord}) add_to_hash(hash, *values);
  add_to_hash(hash, saved);
  add_to_hash(hash, rows);
#endif
  return hash;
}

}  // namespace
}  // namespace liif_fast

int main(int count, char** arguments) {
#ifdef HOPPER
  cuda_on_cpu::set_device({2});
#endif
  return liif_fast::run_seeds(count, arguments, liif_fast::run);
}
