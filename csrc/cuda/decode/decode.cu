// The fused decode's host side: which variant a device runs, packing, the task, and the dispatch to the policies.
#include <algorithm>
#include <map>
#include <mutex>
#include <utility>

#include "cuda/common.cuh"
#include "cuda/decode/neighbors.cuh"
#include "cuda/ptx.cuh"
#include "cuda/row_product.cuh"

namespace liif_fast {
namespace {

struct PackTask {
  DecodeProblem<float> problem;
  MmaPolicy policy;
  int width, groups;  // padded
  bool transposed;
  int64_t units;  // 16-byte units of all chunks
  uint4* chunks;
  float* packed_vectors;
};

// Weight of hidden layer `layer` (0 is the first after the gather) from channel `in` to channel `out`, zero in the
// padding.
__device__ __forceinline__ float weight_at(const PackTask& task, int layer, int out, int in) {
  const int64_t row = task.transposed ? in : out, col = task.transposed ? out : in;
  const int64_t rows = task.problem.widths[layer + 1], cols = task.problem.widths[layer];
  return row < rows && col < cols ? task.problem.weights[layer][row * cols + col] : 0.0f;
}

__device__ __forceinline__ float vector_value(const PackTask& task, int vector, int channel) {
  const DecodeProblem<float>& p = task.problem;
  const int hidden = p.layers - 1;
  if (vector <= hidden) return channel < p.widths[vector] ? p.biases[vector][channel] : 0.0f;
  const int term = vector - hidden - 1;
  if (term < 4) {
    const int terms = p.has_cell ? 4 : 2;
    return term < terms && channel < p.width ? p.weight_geometry[channel * terms + term] : 0.0f;
  }
  const int out = term - 4;
  if (out < fused_outs(p))
    return channel < p.widths[hidden] ? p.weights[hidden][out * p.widths[hidden] + channel] : 0.0f;
  return channel < p.widths[p.layers] ? p.biases[p.layers][channel] : 0.0f;
}

__global__ void __launch_bounds__(kThreads) pack_kernel(const __grid_constant__ PackTask task) {
  const int hidden = task.problem.layers - 1, chunk = chunk_units(task.width);
  const int outs = fused_outs(task.problem);
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  for (int64_t at = first; at < task.units; at += stride) {
    const int order = static_cast<int>(at / chunk / task.groups), group = static_cast<int>(at / chunk % task.groups);
    const int layer = task.transposed ? hidden - 1 - order : order;  // in the order in which they are used
    const PackedUnit unit = packed_unit(task.policy, task.width, group, static_cast<int>(at % chunk));
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int in = unit.in + unit.step * i;
      if (is_16_bit(task.policy)) {
        const float low = weight_at(task, layer, unit.out, in), high = weight_at(task, layer, unit.out, in + 1);
        words[i] = is_float16(task.policy) ? pack(low, high, __half{}) : pack(low, high, __nv_bfloat16{});
      } else {
        const float value = weight_at(task, layer, unit.out, in);
        words[i] = task.policy == MmaPolicy::kTf32 ? round_to_tf32(value) : float_bits(value);
      }
    }
    task.chunks[at] = make_uint4(words[0], words[1], words[2], words[3]);
  }
  const int64_t floats = static_cast<int64_t>(packed_vector_count(hidden, outs)) * task.width;
  for (int64_t at = first; at < floats; at += stride)
    task.packed_vectors[at] = vector_value(task, static_cast<int>(at / task.width), static_cast<int>(at % task.width));
}

// The neighbors of every row and column of a grid's window, or of every coordinate; batch entry after batch entry.
__global__ void __launch_bounds__(kThreads)
    neighbors_kernel(const __grid_constant__ DecodeTask task, AxisNeighbors* neighbors, int64_t rows, int64_t cols) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < rows + cols; i += stride) {
    const bool is_row = i < rows;
    const int64_t at = is_row ? i : i - rows, size = is_row ? task.map_height : task.map_width;
    const int64_t entry = at / (task.coord ? task.queries : is_row ? task.window_height : cols);
    const float coord = task.coord ? task.coord[2 * at + (is_row ? 0 : 1)]
                        : is_row   ? pixel_center<float>(task.window_top + at % task.window_height, task.rows)
                                   : pixel_center<float>(task.window_left + at, task.cols);
    AxisNeighbors found;
    for (int side = 0; side < 2; ++side) {
      const Neighbor<float> one = find_neighbor(coord, task.corners == 4 ? 2 * side - 1 : 0, size);
      const int64_t local =
          is_row ? entry * task.region_height + clamp_to_region(one.index, task.region_top, task.region_height)
                 : clamp_to_region(one.index, task.region_left, task.region_width);
      found.index[side] = static_cast<int>(local);
      found.rel[side] = one.rel;
    }
    neighbors[i] = found;
  }
}

// grads += the sums over parts.
__global__ void __launch_bounds__(kThreads)
    add_weights_kernel(const __grid_constant__ WeightParts parts, float* grads, int64_t count) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count / 4; i += stride) {
    const float4 sum = add_parts(parts.sums + i * 4, parts.parts, count);
    const int64_t row = i * 4 / parts.width, col = i * 4 % parts.width;
    const bool transposes = parts.transposes_first && row < parts.width;  // of the first layer
    float* const to = grads + (transposes ? col * parts.width + row : i * 4);
    const int64_t step = transposes ? parts.width : 1;
    const float values[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) to[j * step] += values[j];
  }
}

int64_t neighbor_rows(const DecodeQueries<float>& q) { return q.batch * (q.coord ? q.queries : q.window_height); }
int64_t neighbor_cols(const DecodeQueries<float>& q) { return q.coord ? q.batch * q.queries : q.window_width; }

}  // namespace

namespace {

struct DeviceLimits {
  int processors, block_bytes, sm_bytes, arch;
};

cudaError_t ask_limits(int device, DeviceLimits& limits) {
  int major = 0, minor = 0;
  const std::pair<cudaDeviceAttr, int*> wanted[] = {{cudaDevAttrMultiProcessorCount, &limits.processors},
                                                    {cudaDevAttrMaxSharedMemoryPerBlockOptin, &limits.block_bytes},
                                                    {cudaDevAttrMaxSharedMemoryPerMultiprocessor, &limits.sm_bytes},
                                                    {cudaDevAttrComputeCapabilityMajor, &major},
                                                    {cudaDevAttrComputeCapabilityMinor, &minor}};
  for (const auto& [attribute, value] : wanted) {
    const cudaError_t error = cudaDeviceGetAttribute(value, attribute, device);
    if (error != cudaSuccess) return error;
  }
  limits.arch = major * 100 + minor * 10;
  return cudaSuccess;
}

// Of the current device; the driver is asked once for each.
cudaError_t device_limits(DeviceLimits& limits) {
  static std::mutex mutex;
  static std::map<int, DeviceLimits> known;
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  const std::lock_guard<std::mutex> lock(mutex);
  if (const auto found = known.find(device); found != known.end()) {
    limits = found->second;
    return cudaSuccess;
  }
  error = ask_limits(device, limits);
  if (error == cudaSuccess) known[device] = limits;
  return error;
}

}  // namespace

DecodeVariant choose_variant(MmaPolicy policy, int width, int64_t total_rows, const char** error) {
  DeviceLimits limits = {};
  const cudaError_t status = device_limits(limits);
  *error = status == cudaSuccess ? nullptr : cudaGetErrorString(status);
  if (is_wgmma(policy) && width <= 128) return {policy, 128, 256, 0, 0};  // as HopperTile
  const int bytes = operand_bytes(policy), padded = padded_width(width), large = large_rows(bytes);
  const bool is_small_problem = (total_rows + large - 1) / large < 2 * limits.processors;
  const bool small = padded == 256 &&
                     (is_small_problem || has_small_tiles_only(limits.arch) || limits.block_bytes < kLargeSharedBytes);
  const int rows = small ? small_rows(bytes) : large;
  const int blocks = limits.processors * (limits.sm_bytes >= kLargeSharedBytes ? blocks_per_sm(padded, bytes) : 1);
  return {policy, padded, rows, blocks, is_wgmma(policy) ? kHopperRowSums : warp_rows(rows, padded, bytes)};
}

int64_t packed_bytes(const DecodeVariant& variant, int hidden, int outs) {
  const int64_t chunks = static_cast<int64_t>(hidden) * group_count(variant.policy, variant.width);
  return chunks * variant.width * 64 + static_cast<int64_t>(packed_vector_count(hidden, outs)) * variant.width * 4;
}

namespace {

constexpr int64_t kAlignment = 256;
int64_t aligned(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

struct SavedSizes {
  int64_t rows, blended, masks;
};
SavedSizes saved_sizes(const DecodeVariant& variant, const SavedShape& shape) {
  const int64_t row = static_cast<int64_t>(variant.width) * operand_bytes(variant.policy), rows = shape.rows.count;
  const int64_t mask_bits = static_cast<int64_t>(variant.rows) * variant.width / kThreads;
  return {(shape.hidden - shape.first_layer + (shape.last_layer ? 1 : 0)) * rows * row,
          aligned(rows / shape.corners * row),
          (shape.hidden + 1) * (rows / variant.rows) * ((mask_bits + 31) / 32) * kThreads * 4};
}

}  // namespace

int64_t saved_bytes(const DecodeVariant& variant, const SavedShape& shape) {
  const SavedSizes sizes = saved_sizes(variant, shape);
  return sizes.rows + sizes.blended + sizes.masks;
}

SavedActivations saved_at(void* buffer, const DecodeVariant& variant, const SavedShape& shape) {
  const SavedSizes sizes = saved_sizes(variant, shape);
  char* const bytes = static_cast<char*>(buffer);
  return {bytes,
          bytes + sizes.rows,
          reinterpret_cast<uint32_t*>(bytes + sizes.rows + sizes.blended),
          shape.rows.first / variant.rows,
          shape.rows.count / variant.rows,
          shape.first_layer,
          shape.last_layer};
}

const char* launch_pack(const DecodeProblem<float>& problem, const DecodeVariant& variant, Direction direction,
                        void* packed, void* stream) {
  const int groups = group_count(variant.policy, variant.width);
  const int64_t units = static_cast<int64_t>(problem.layers - 1) * groups * chunk_units(variant.width);
  uint4* const chunks = static_cast<uint4*>(packed);
  const bool transposed = direction != Direction::kForward;
  const MmaPolicy policy = direction == Direction::kBackwardWithPoints ? points_policy(variant.policy) : variant.policy;
  const PackTask task{problem,    policy, variant.width, groups,
                      transposed, units,  chunks,        reinterpret_cast<float*>(chunks + units)};
  return launch(pack_kernel, blocks_for(units / kWarp + 1), stream, task);
}

DecodeTask make_task(const DecodeProblem<float>& p, const DecodeVariant& variant, const void* packed,
                     bool latent_is_float, const RowRange& rows) {
  DecodeTask task = {};
  static_cast<DecodeQueries<float>&>(task) = p;
  task.total = p.batch * p.queries;
  task.latent_is_float = latent_is_float;
  task.rel_cell[0] = mul_rounded(p.grid_cell[0], static_cast<float>(p.map_height));
  task.rel_cell[1] = mul_rounded(p.grid_cell[1], static_cast<float>(p.map_width));
  task.hidden = p.layers - 1;
  task.outs = fused_outs(p);
  task.weights = static_cast<const unsigned char*>(packed);
  const int64_t vectors_bytes = static_cast<int64_t>(packed_vector_count(task.hidden, task.outs)) * variant.width * 4;
  task.packed_vectors =
      reinterpret_cast<const float*>(task.weights + packed_bytes(variant, task.hidden, task.outs) - vectors_bytes);
  const int64_t slots = variant.rows / p.corners;
  task.first_tile = rows.first / variant.rows;
  task.tiles = rows.count < 0 ? (task.total + slots - 1) / slots : rows.count / variant.rows;
  return task;
}

namespace {

// f(std::integral_constant<MmaPolicy, policy>{}).
template <class F>
const char* dispatch_policy(MmaPolicy policy, const F& f) {
  switch (policy) {
    case MmaPolicy::kFloat16:
      return f(std::integral_constant<MmaPolicy, MmaPolicy::kFloat16>{});
    case MmaPolicy::kBFloat16:
      return f(std::integral_constant<MmaPolicy, MmaPolicy::kBFloat16>{});
    case MmaPolicy::kTf32:
      return f(std::integral_constant<MmaPolicy, MmaPolicy::kTf32>{});
    case MmaPolicy::kFloat32:
      return f(std::integral_constant<MmaPolicy, MmaPolicy::kFloat32>{});
    default:
      return "the wgmma kernels have launches of their own";
  }
}

// backward: null for the forward.
const char* launch_wgmma(const DecodeTask& task, const DecodeVariant& variant, const SavedActivations& saved,
                         const BackwardArrays* backward, void* workspace, void* stream) {
  const int64_t rows = neighbor_rows(task), cols = neighbor_cols(task);
  AxisNeighbors* const neighbors = static_cast<AxisNeighbors*>(workspace);
  const unsigned blocks = blocks_for((rows + cols + kWarp - 1) / kWarp);
  if (const char* error = launch(neighbors_kernel, blocks, stream, task, neighbors, rows, cols)) return error;
  HopperTask hopper = {};
  static_cast<DecodeTask&>(hopper) = task;
  hopper.neighbor_rows = neighbors;
  hopper.neighbor_cols = neighbors + rows;
  hopper.columns = Divisor::of(task.coord ? 1 : task.window_width);
  hopper.entry_queries = Divisor::of(task.queries);
  hopper.padded_width = variant.width;
  const int64_t rows_of_tile = variant.width == 128 ? variant.rows : kRowPadding;
  hopper.first_tile = task.first_tile * variant.rows / rows_of_tile;
  hopper.tiles = (task.tiles * variant.rows + rows_of_tile - 1) / rows_of_tile;
  hopper.saved = saved;
  hopper.saved_tile_rows = variant.rows;
  hopper.saved_tile = static_cast<int>((task.first_tile - saved.first_tile) * variant.rows / rows_of_tile);
  if (backward)
    return is_float16(variant.policy) ? launch_hopper_backward<MmaPolicy::kWgmmaFloat16>(hopper, *backward, stream)
                                      : launch_hopper_backward<MmaPolicy::kWgmmaBFloat16>(hopper, *backward, stream);
  return is_float16(variant.policy) ? launch_hopper<MmaPolicy::kWgmmaFloat16>(hopper, stream)
                                    : launch_hopper<MmaPolicy::kWgmmaBFloat16>(hopper, stream);
}

}  // namespace

int64_t workspace_bytes(const DecodeProblem<float>& problem, const DecodeVariant& variant) {
  if (!is_wgmma(variant.policy)) return 0;
  return (neighbor_rows(problem) + neighbor_cols(problem)) * static_cast<int64_t>(sizeof(AxisNeighbors));
}

const char* launch_decode_forward(const DecodeTask& task, const DecodeVariant& variant, const SavedActivations& saved,
                                  void* workspace, void* stream) {
  if (task.tiles == 0) return nullptr;
  if (is_wgmma(variant.policy)) return launch_wgmma(task, variant, saved, nullptr, workspace, stream);
  return dispatch_policy(variant.policy,
                         [&](auto policy) { return launch_forward<policy()>(task, variant, saved, stream); });
}

const char* launch_decode_backward(const DecodeTask& task, const DecodeVariant& variant, const SavedActivations& saved,
                                   const BackwardArrays& backward, void* workspace, void* stream) {
  if (task.tiles == 0) return nullptr;
  if (is_wgmma(variant.policy) && !backward.coord)
    return launch_wgmma(task, variant, saved, &backward, workspace, stream);
  return dispatch_policy(points_policy(variant.policy), [&](auto policy) {
    return launch_backward<policy()>(task, variant, saved, backward, stream);
  });
}

namespace {
// As many as keep all multiprocessors busy, where there are enough rows.
int weight_parts(const DecodeVariant& variant, int hidden, int64_t rows) {
  const int64_t blocks = variant.blocks / (hidden * (variant.width == 256 ? 2 : 1));
  return static_cast<int>(std::max<int64_t>(std::min(blocks, rows / kRowPadding), 1));
}
}  // namespace

int64_t weights_bytes(const DecodeVariant& variant, int hidden, int64_t rows) {
  if (hidden == 0) return 0;
  return weight_parts(variant, hidden, rows) * int64_t{hidden} * variant.width * variant.width * 4;
}

const char* launch_decode_weights(const DecodeTask& task, const DecodeVariant& variant, const SavedActivations& saved,
                                  const BackwardArrays& backward, float* grads, void* workspace, void* stream) {
  if (task.tiles == 0 || task.hidden == 0) return nullptr;
  const WeightParts parts{static_cast<float*>(workspace), weight_parts(variant, task.hidden, task.tiles * variant.rows),
                          variant.width, variant.rows, saved.first_layer > 0};
  const auto run =
      is_float16(variant.policy) ? launch_weights<MmaPolicy::kFloat16> : launch_weights<MmaPolicy::kBFloat16>;
  if (const char* error = run(task, variant, saved, backward, parts, stream)) return error;
  const int64_t count = int64_t{task.hidden} * variant.width * variant.width;
  return launch(add_weights_kernel, blocks_for(count / 4 / kWarp), stream, parts, grads, count);
}

}  // namespace liif_fast
