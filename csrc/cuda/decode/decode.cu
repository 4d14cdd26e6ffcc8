// The fused decode's host side: which variant a device runs, packing, and the way to each kind of products.
#include <climits>

#include "cuda/common.cuh"
#include "cuda/decode/variant.h"
#include "cuda/ptx.cuh"

namespace liif_fast {

template <class Element, bool kTensorCores>
struct Products;
template <class P>
const char* launch_forward_of(const QueryTask&, const QueryVariant&, const Saved&, void*);
template <class P>
const char* launch_backward_of(const QueryTask&, const QueryVariant&, const Saved&, const QueryBackward&, void*);

namespace {

// f(Products{}) of a kind of operands.
template <class F>
const char* with_products(Operands operands, const F& f) {
  switch (operands) {
    case Operands::kFloat16:
      return f(static_cast<Products<__half, true>*>(nullptr));
    case Operands::kBFloat16:
      return f(static_cast<Products<__nv_bfloat16, true>*>(nullptr));
    case Operands::kTf32:
      return f(static_cast<Products<float, true>*>(nullptr));
    default:
      return f(static_cast<Products<float, false>*>(nullptr));
  }
}

struct PackTask {
  QueryProblem<float> problem;
  Operands operands;
  int width, groups;  // padded
  bool transposed;
  int64_t units;  // 16-byte units of all chunks
  uint4* chunks;
  float* lines;
};

// Weight of hidden layer `layer` (0 is the first behind the gather) from channel `in` to channel `out`, zero in the
// padding.
__device__ __forceinline__ float weight_at(const PackTask& task, int layer, int out, int in) {
  const int64_t row = task.transposed ? in : out, col = task.transposed ? out : in;
  const int64_t rows = task.problem.widths[layer + 1], cols = task.problem.widths[layer];
  return row < rows && col < cols ? task.problem.weights[layer][row * cols + col] : 0.0f;
}

__device__ __forceinline__ float line_at(const PackTask& task, int line, int channel) {
  const QueryProblem<float>& p = task.problem;
  const int hidden = p.layers - 1;
  if (line <= hidden) return channel < p.widths[line] ? p.biases[line][channel] : 0.0f;
  const int term = line - hidden - 1;
  if (term < 4) {
    const int terms = p.has_cell ? 4 : 2;
    return term < terms && channel < p.width ? p.weight_geometry[channel * terms + term] : 0.0f;
  }
  const int out = term - 4;
  if (out < p.widths[p.layers])
    return channel < p.widths[hidden] ? p.weights[hidden][out * p.widths[hidden] + channel] : 0.0f;
  return channel < p.widths[p.layers] ? p.biases[p.layers][channel] : 0.0f;
}

__global__ void __launch_bounds__(kThreads) pack_kernel(const __grid_constant__ PackTask task) {
  const int hidden = task.problem.layers - 1, chunk = chunk_units(task.width);
  const int outs = static_cast<int>(task.problem.widths[task.problem.layers]);
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  for (int64_t at = first; at < task.units; at += stride) {
    const int order = static_cast<int>(at / chunk / task.groups), group = static_cast<int>(at / chunk % task.groups);
    const int layer = task.transposed ? hidden - 1 - order : order;  // in the order in which they are used
    const PackedUnit unit = packed_unit(task.operands, task.width, group, static_cast<int>(at % chunk));
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (task.operands == Operands::kFloat16 || task.operands == Operands::kBFloat16) {
        const float low = weight_at(task, layer, unit.out, unit.in + 2 * i);
        const float high = weight_at(task, layer, unit.out, unit.in + 2 * i + 1);
        words[i] = task.operands == Operands::kFloat16 ? pack(low, high, __half{}) : pack(low, high, __nv_bfloat16{});
      } else {
        const float value = weight_at(task, layer, unit.out, unit.in + i);
        words[i] = task.operands == Operands::kTf32 ? round_to_tf32(value) : float_bits(value);
      }
    }
    task.chunks[at] = make_uint4(words[0], words[1], words[2], words[3]);
  }
  const int64_t floats = static_cast<int64_t>(packed_lines(hidden, outs)) * task.width;
  for (int64_t at = first; at < floats; at += stride)
    task.lines[at] = line_at(task, static_cast<int>(at / task.width), static_cast<int>(at % task.width));
}

}  // namespace

QueryVariant choose_variant(Operands operands, int width, const char** error) {
  int device = 0, processors = 0, block_bytes = 0, sm_bytes = 0, major = 0, minor = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (status == cudaSuccess)
    status = cudaDeviceGetAttribute(&block_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (status == cudaSuccess)
    status = cudaDeviceGetAttribute(&sm_bytes, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  *error = status == cudaSuccess ? nullptr : cudaGetErrorString(status);
  const int bytes = operand_bytes(operands), padded = padded_width(width);
  const bool small =
      padded == 256 && (has_small_tiles_only(major * 100 + minor * 10) || block_bytes < kLargeSharedBytes);
  QueryVariant variant;
  variant.operands = operands;
  variant.width = padded;
  variant.rows = small ? small_rows(bytes) : large_rows(bytes);
  variant.blocks = processors * (padded == 64 && sm_bytes >= kLargeSharedBytes ? 2 : 1);
  variant.row_sums = row_sums_of(variant.rows, padded, bytes);
  return variant;
}

int64_t packed_bytes(const QueryVariant& variant, int hidden, int outs) {
  const int64_t chunks = static_cast<int64_t>(hidden) * groups_of(variant.operands, variant.width);
  return chunks * variant.width * 64 + static_cast<int64_t>(packed_lines(hidden, outs)) * variant.width * 4;
}

namespace {

constexpr int64_t kAlignment = 256;
int64_t aligned(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

struct SavedSizes {
  int64_t rows, blended, masks;
};
SavedSizes saved_sizes(const QueryVariant& variant, int hidden, int corners, bool last_layer, int64_t rows) {
  const int64_t row = static_cast<int64_t>(variant.width) * operand_bytes(variant.operands);
  const int64_t mask_bits = static_cast<int64_t>(variant.rows) * variant.width / kThreads;
  return {(hidden + (last_layer ? 1 : 0)) * rows * row, aligned(rows / corners * row),
          (hidden + 1) * (rows / variant.rows) * ((mask_bits + 31) / 32) * kThreads * 4};
}

}  // namespace

int64_t saved_bytes(const QueryVariant& variant, int hidden, int corners, bool last_layer, int64_t rows) {
  const SavedSizes sizes = saved_sizes(variant, hidden, corners, last_layer, rows);
  return sizes.rows + sizes.blended + sizes.masks;
}

Saved saved_at(void* buffer, const QueryVariant& variant, int hidden, int corners, bool last_layer, int64_t first_row,
               int64_t rows) {
  const SavedSizes sizes = saved_sizes(variant, hidden, corners, last_layer, rows);
  char* const bytes = static_cast<char*>(buffer);
  return {bytes,
          bytes + sizes.rows,
          reinterpret_cast<uint32_t*>(bytes + sizes.rows + sizes.blended),
          first_row / variant.rows,
          rows / variant.rows,
          last_layer};
}

const char* launch_pack(const QueryProblem<float>& problem, const QueryVariant& variant, bool transposed, void* packed,
                        void* stream) {
  PackTask task;
  task.problem = problem;
  task.operands = variant.operands;
  task.width = variant.width;
  task.groups = groups_of(variant.operands, variant.width);
  task.transposed = transposed;
  task.units = static_cast<int64_t>(problem.layers - 1) * task.groups * chunk_units(variant.width);
  task.chunks = static_cast<uint4*>(packed);
  task.lines = reinterpret_cast<float*>(task.chunks + task.units);
  return launch(pack_kernel, blocks_for(task.units / kWarp + 1), stream, task);
}

QueryTask make_task(const QueryProblem<float>& p, const QueryVariant& variant, const void* packed, bool latent_is_float,
                    int64_t first_row, int64_t rows) {
  QueryTask task = {};
  task.total = p.batch * p.queries;
  task.queries = p.queries;
  task.corners = p.corners;
  task.latent_map = p.latent_map;
  task.latent_is_float = latent_is_float;
  task.latent_width = p.width;
  task.map_height = p.map_height;
  task.map_width = p.map_width;
  task.region_top = p.region_top;
  task.region_left = p.region_left;
  task.region_height = p.region_height;
  task.region_width = p.region_width;
  task.coord = p.coord;
  task.cell = p.cell;
  task.has_cell = p.has_cell;
  task.image_height = p.image_height;
  task.image_width = p.image_width;
  task.window_top = p.window_top;
  task.window_left = p.window_left;
  task.window_width = p.window_width;
  task.rel_cell[0] = mul_rounded(p.grid_cell[0], static_cast<float>(p.map_height));
  task.rel_cell[1] = mul_rounded(p.grid_cell[1], static_cast<float>(p.map_width));
  task.hidden = p.layers - 1;
  task.outs = static_cast<int>(p.out_width());
  task.weights = static_cast<const unsigned char*>(packed);
  task.lines =
      reinterpret_cast<const float*>(task.weights + packed_bytes(variant, task.hidden, task.outs) -
                                     static_cast<int64_t>(packed_lines(task.hidden, task.outs)) * variant.width * 4);
  task.out = p.out;
  task.out_batch = p.out_batch;
  task.out_query = p.out_query;
  task.out_channel = p.out_channel;
  const int64_t slots = variant.rows / p.corners;
  task.first_tile = first_row / variant.rows;
  task.tiles = rows < 0 ? (task.total + slots - 1) / slots : rows / variant.rows;
  return task;
}

const char* launch_query_forward(const QueryTask& task, const QueryVariant& variant, const Saved& saved, void* stream) {
  if (task.tiles == 0) return nullptr;
  return with_products(variant.operands, [&](auto* products) {
    return launch_forward_of<std::remove_pointer_t<decltype(products)>>(task, variant, saved, stream);
  });
}

const char* launch_query_backward(const QueryTask& task, const QueryVariant& variant, const Saved& saved,
                                  const QueryBackward& backward, void* stream) {
  if (task.tiles == 0) return nullptr;
  return with_products(variant.operands, [&](auto* products) {
    return launch_backward_of<std::remove_pointer_t<decltype(products)>>(task, variant, saved, backward, stream);
  });
}

}  // namespace liif_fast
