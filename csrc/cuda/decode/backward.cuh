// The fused decode, backward: from gradients of the outputs to those of the latents, tile by tile, over what the
// forward saved. Weight gradients are products over all rows, which a library makes from the gradients written here and
// the saved activations; column sums (biases, geometry terms, last layer) are made on the way.
//
// A column's sum is added to by one thread of one block in a fixed order, so sums repeat bit for bit. Gradients of
// latents are added by the hardware in any order, or written row by row for a caller who adds them in a fixed one.
#pragma once

#include "cuda/decode/layers.cuh"
#include "cuda/decode/saved.cuh"

namespace liif_fast {

// What gradients of coordinates need in shared memory: per warp column and row, the products of the row's gradient with
// the four geometry terms, and of its hidden vector with the blend's gradient.
constexpr int kRowDots = 5;
template <class T>
constexpr int row_dots_bytes() {
  return T::kWarpCols * T::kRows * kRowDots * 4;
}

// The gradients of the tile's outputs, zeros behind the last query: [slot][out].
template <class T>
__device__ __forceinline__ void load_grad_out(const QueryTask& task, const QueryBackward& backward, int64_t tile,
                                              float* grad_out) {
  const int slots = T::kRows / task.corners, count = slots * task.outs;
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) {
    const int slot = task.out_channel == 1 ? i / task.outs : i % slots;
    const int o = task.out_channel == 1 ? i % task.outs : i / slots;
    const int64_t query = query_of<T>(task, tile, slot);
    float grad = 0.0f;
    if (query >= 0) {
      const int64_t batch = query / task.queries, at = query - batch * task.queries;
      grad = backward.grad_out[batch * task.out_batch + at * task.out_query + o * task.out_channel];
    }
    grad_out[slot * task.outs + o] = grad;
  }
}

// Adds a lane's column values to the block's sums `line`: first over the eight rows of a fragment by halving, so that
// each lane ends with one channel (or two lanes with the same one), then to memory that this thread alone writes.
template <class T>
__device__ __forceinline__ void add_column_sums(const QueryTask& task, const QueryBackward& backward, int line,
                                                const Place<T>& place, float (&column)[T::kColGroups][T::kVector]) {
  const int warp_row = place.warp / T::kWarpCols;
  const int64_t block = static_cast<int64_t>(blockIdx.x) * T::kWarpRows + warp_row;
  float* const sums = backward.sums + (block * sum_lines(task.hidden, task.outs) + line) * T::kWidth;
#pragma unroll
  for (int group = 0; group < T::kColGroups; ++group) {
    float (&v)[T::kVector] = column[group];
    int channel = 0;
#pragma unroll
    for (int count = T::kVector / 2, lanes = 16; lanes >= 4; count /= 2, lanes /= 2) {
      const bool upper = place.lane & lanes;
      if (count == 0) {  // four channels for eight rows: the last step only adds
        v[0] += __shfl_xor_sync(kAllLanes, v[0], lanes);
      } else {
#pragma unroll
        for (int i = 0; i < count; ++i) {
          const float other = __shfl_xor_sync(kAllLanes, upper ? v[i] : v[i + count], lanes);
          v[i] = (upper ? v[i + count] : v[i]) + other;
        }
        channel += upper ? count : 0;
      }
    }
    if (T::kVector == 8 || !(place.lane & 4)) sums[place.channel_of(group) + channel] += v[0];
  }
}

// Sum over a row's channels of this lane, over the four lanes that share the row.
__device__ __forceinline__ float sum_over_quad(float value) {
  value += __shfl_xor_sync(kAllLanes, value, 1);
  return value + __shfl_xor_sync(kAllLanes, value, 2);
}

// A finished layer's gradients: to act for the next product, to memory for the weights' gradient, to the bias' sums.
template <class T, class Values>
__device__ __forceinline__ void store_layer(const QueryTask& task, const QueryBackward& backward, int layer,
                                            int64_t tile, const Place<T>& place, unsigned char* act,
                                            const Values& values) {
  float column[T::kColGroups][T::kVector] = {};
#pragma unroll
  for (int m = 0; m < T::kRowTiles; ++m)
#pragma unroll
    for (int group = 0; group < T::kColGroups; ++group) {
      uint4 words[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float v[T::kVector];
        values(m, group, half, v);
        words[half] = to_words<T>(v);
        *row_at<T>(backward.rows, {task.first_tile, task.tiles}, layer - 1, tile, place.row_of(m, half),
                   place.channel_of(group)) = words[half];
#pragma unroll
        for (int i = 0; i < T::kVector; ++i) column[group][i] += v[i];
      }
      store_act<T>(act, place.first_row_tile + m, place.first_group + group, place.lane, words);
    }
  add_column_sums<T>(task, backward, layer, place, column);
}

// The gradient of the blended hidden vector of a row's query.
template <class T>
__device__ __forceinline__ void blended_gradient(const QueryTask& task, const float* grad_out, int slot, int channel,
                                                 float (&v)[T::kVector]) {
#pragma unroll
  for (int i = 0; i < T::kVector; ++i) v[i] = 0.0f;
  for (int o = 0; o < task.outs; ++o) {
    const float grad = grad_out[slot * task.outs + o];
    float last[T::kVector];
    load_floats(last_line<T>(task, o) + channel, last);
#pragma unroll
    for (int i = 0; i < T::kVector; ++i) v[i] = fmaf(grad, last[i], v[i]);
  }
}

// Gradients of the last layer's rows: blended hidden vectors times gradients of the outputs.
template <class T>
__device__ __forceinline__ void last_layer_sums(const QueryTask& task, const Saved& saved,
                                                const QueryBackward& backward, int64_t tile, const Place<T>& place,
                                                const float* grad_out) {
  const int corners = task.corners, slots = T::kRows / corners;
  for (int o = 0; o < task.outs; ++o) {
    float column[T::kColGroups][T::kVector] = {};
#pragma unroll
    for (int pair = 0; pair < T::kRowTiles / 2; ++pair)
      for (int sub = 0; sub < (corners == 4 ? 1 : 4); ++sub) {
        const int slot = slot_of(place.row_of(2 * pair + sub / 2, sub % 2), corners);
        const float grad = grad_out[slot * task.outs + o];
        if (query_of<T>(task, tile, slot) < 0) continue;  // its hidden vector may be anything
#pragma unroll
        for (int group = 0; group < T::kColGroups; ++group) {
          float v[T::kVector];
          from_words<T>(*saved_blended<T>(saved, tile, slots, slot, place.channel_of(group)), v);
#pragma unroll
          for (int i = 0; i < T::kVector; ++i) column[group][i] = fmaf(grad, v[i], column[group][i]);
        }
      }
    __syncwarp();
    add_column_sums<T>(task, backward, task.hidden + 5 + o, place, column);
  }
}

// acc = gradients of the last hidden layer before its ReLU; with row_dots also the gradient of every row's weight.
template <class T>
__device__ __forceinline__ void through_blend(const QueryTask& task, const Saved& saved, int64_t tile,
                                              const Geometry<T>& geometry, const Place<T>& place, const float* grad_out,
                                              float* row_dots, Accumulators<T>& acc) {
  Mask<T> mask;
  mask.load(saved, task.hidden, tile);
  const int warp_col = place.first_group / T::kColGroups;
#pragma unroll
  for (int pair = 0; pair < T::kRowTiles / 2; ++pair) {
    float dots[4] = {};
#pragma unroll
    for (int group = 0; group < T::kColGroups; ++group) {
      const int channel = place.channel_of(group);
      float gradient[T::kVector];
#pragma unroll
      for (int k = 0; k < 4; ++k) {  // the four corners of one query, or four queries
        const int m = 2 * pair + k / 2, half = k % 2, row = place.row_of(m, half);
        if (k == 0 || task.corners == 1)
          blended_gradient<T>(task, grad_out, slot_of(row, task.corners), channel, gradient);
        if (row_dots) {
          float hidden[T::kVector];
          from_words<T>(*saved_row<T>(saved, task.hidden, tile, row, channel), hidden);
#pragma unroll
          for (int i = 0; i < T::kVector; ++i) dots[k] = fmaf(gradient[i], hidden[i], dots[k]);
        }
        float v[T::kVector];
#pragma unroll
        for (int i = 0; i < T::kVector; ++i) v[i] = geometry.weight[row] * gradient[i];
        mask.apply(m, group, half, v);
        set_values<T>(acc, m, group, half, v);
      }
    }
    if (row_dots) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const float dot = sum_over_quad(dots[k]);
        const int row = place.row_of(2 * pair + k / 2, k % 2);
        if (place.quad == 0) row_dots[(warp_col * T::kRows + row) * kRowDots + 4] = dot;
      }
    }
  }
}

// The first layer's gradients in acc: to the latents, and times the geometry to its sums.
template <class T>
__device__ __forceinline__ void finish_first_layer(const QueryTask& task, const QueryBackward& backward, int64_t tile,
                                                   const Geometry<T>& geometry, const Place<T>& place, float* row_dots,
                                                   const Accumulators<T>& acc) {
  const int warp_col = place.first_group / T::kColGroups;
#pragma unroll 1
  for (int term = -1; term < 4; ++term) {  // the bias, rel_row, rel_col, and the cell's two
    if (term >= 2 && !task.has_cell) break;
    float column[T::kColGroups][T::kVector] = {};
#pragma unroll
    for (int m = 0; m < T::kRowTiles; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = place.row_of(m, half);
        const Row& seen = geometry.rows[row];
        float factor = 1.0f;
        if (term == 0) factor = seen.rel_row;
        if (term == 1) factor = seen.rel_col;
        if (term >= 2) factor = task.cell ? geometry.rel_cell[row][term - 2] : task.rel_cell[term - 2];
        if (query_of<T>(task, tile, slot_of(row, task.corners)) < 0) factor = 0.0f;
#pragma unroll
        for (int group = 0; group < T::kColGroups; ++group) {
          float v[T::kVector];
          values_of<T>(acc, m, group, half, v);
#pragma unroll
          for (int i = 0; i < T::kVector; ++i) column[group][i] = fmaf(factor, v[i], column[group][i]);
        }
      }
    add_column_sums<T>(task, backward, term < 0 ? 0 : task.hidden + 1 + term, place, column);
    if (row_dots && term >= 0) {
#pragma unroll
      for (int m = 0; m < T::kRowTiles; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float dot = 0.0f;
#pragma unroll
          for (int group = 0; group < T::kColGroups; ++group) {
            float v[T::kVector], line[T::kVector];
            values_of<T>(acc, m, group, half, v);
            load_floats(geometry_line<T>(task, term) + place.channel_of(group), line);
#pragma unroll
            for (int i = 0; i < T::kVector; ++i) dot = fmaf(v[i], line[i], dot);
          }
          dot = sum_over_quad(dot);
          if (place.quad == 0) row_dots[(warp_col * T::kRows + place.row_of(m, half)) * kRowDots + term] = dot;
        }
    }
  }
#pragma unroll
  for (int m = 0; m < T::kRowTiles; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = place.row_of(m, half);
      const bool exists = query_of<T>(task, tile, slot_of(row, task.corners)) >= 0;
      const int64_t offset = geometry.rows[row].offset, at = (tile - task.first_tile) * T::kRows + row;
#pragma unroll
      for (int group = 0; group < T::kColGroups; ++group) {
        const int channel = place.channel_of(group);
        float v[T::kVector];
        values_of<T>(acc, m, group, half, v);
#pragma unroll
        for (int i = 0; i < T::kVector; i += 4) {
          float4 four = make_float4(v[i], v[i + 1], v[i + 2], v[i + 3]);
          if (!backward.latent_map) {
            if (!exists) four = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            *reinterpret_cast<float4*>(backward.latent_rows + at * T::kWidth + channel + i) = four;
          } else if (exists && channel < task.latent_width) {
            reduce_add(backward.latent_map + offset + channel + i, four);
          }
        }
      }
      if (!backward.latent_map && warp_col == 0 && place.quad == 0)
        backward.latent_places[at] = offset / task.latent_width;
    }
}

// Gradients of coord and cell from the rows' products; one thread a query.
template <class T>
__device__ __forceinline__ void finish_points(const QueryTask& task, const QueryBackward& backward, int64_t tile,
                                              const Geometry<T>& geometry, const float* row_dots) {
  const float height = static_cast<float>(task.map_height), width = static_cast<float>(task.map_width);
  for (int slot = static_cast<int>(threadIdx.x); slot < T::kRows / task.corners; slot += kThreads) {
    const int64_t query = query_of<T>(task, tile, slot);
    if (query < 0) continue;
    float rel_row[2] = {}, rel_col[2] = {}, grad_row[2] = {}, grad_col[2] = {}, grad_cell[2] = {}, grad_weight[4] = {};
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) {
      if (corner >= task.corners) break;
      const int row = task.corners == 4 ? (slot / 8 * 4 + corner) * 8 + slot % 8 : slot;
      float dots[kRowDots] = {};
#pragma unroll 1
      for (int warp_col = 0; warp_col < T::kWarpCols; ++warp_col)
#pragma unroll
        for (int i = 0; i < kRowDots; ++i)
          if (i < 2 || i == 4 || task.has_cell) dots[i] += row_dots[(warp_col * T::kRows + row) * kRowDots + i];
      rel_row[corner >> 1] = geometry.rows[row].rel_row;
      rel_col[corner & 1] = geometry.rows[row].rel_col;
      grad_row[corner >> 1] += dots[0];
      grad_col[corner & 1] += dots[1];
      grad_cell[0] += dots[2];
      grad_cell[1] += dots[3];
      grad_weight[corner] = dots[4];
    }
    if (task.corners == 4) area_weights_backward(rel_row, rel_col, grad_weight, grad_row, grad_col);
    backward.coord[2 * query] = (grad_row[0] + grad_row[1]) * height;
    backward.coord[2 * query + 1] = (grad_col[0] + grad_col[1]) * width;
    if (backward.cell) {
      backward.cell[2 * query] = grad_cell[0] * height;
      backward.cell[2 * query + 1] = grad_cell[1] * width;
    }
  }
}

template <class T>
__device__ __forceinline__ void backward_tiles(const QueryTask& task, const Saved& saved,
                                               const QueryBackward& backward) {
  LIIF_DYNAMIC_SHARED(shared);
  unsigned char* const act = shared;
  unsigned char* const ring = act + T::kActBytes;
  Geometry<T>& geometry = *reinterpret_cast<Geometry<T>*>(ring + T::kStages * T::kChunkBytes);
  float* const grad_out = reinterpret_cast<float*>(&geometry + 1);
  float* const row_dots = backward.coord ? grad_out + T::kRows / task.corners * task.outs : nullptr;

  const Place<T> place;
  const int64_t mine = tiles_of_block(task.tiles);
  WeightStream<T> stream(task.weights, task.hidden * T::kGroups, mine, ring);
  for (int64_t i = 0; i < mine; ++i) {
    const int64_t tile = task.first_tile + blockIdx.x + i * gridDim.x;
    find_rows(task, tile, geometry);
    load_grad_out<T>(task, backward, tile, grad_out);
    __syncthreads();
    last_layer_sums<T>(task, saved, backward, tile, place, grad_out);
    Accumulators<T> acc;
    through_blend<T>(task, saved, tile, geometry, place, grad_out, row_dots, acc);
    for (int layer = task.hidden; layer >= 1; --layer) {
      store_layer<T>(task, backward, layer, tile, place, act,
                     [&](int m, int group, int half, float (&v)[T::kVector]) { values_of<T>(acc, m, group, half, v); });
#pragma unroll
      for (int m = 0; m < T::kRowTiles; ++m)
#pragma unroll
        for (int n = 0; n < T::kColTiles; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) acc[m][n][i] = 0.0f;
#pragma unroll 1
      for (int group = 0; group < T::kGroups; ++group) multiply<T>(act, stream.next(), group, place, acc);
      __syncthreads();  // act has been read
      Mask<T> mask;
      mask.load(saved, layer - 1, tile);
#pragma unroll
      for (int m = 0; m < T::kRowTiles; ++m)
#pragma unroll
        for (int group = 0; group < T::kColGroups; ++group)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            float v[T::kVector];
            values_of<T>(acc, m, group, half, v);
            mask.apply(m, group, half, v);
            set_values<T>(acc, m, group, half, v);
          }
    }
    finish_first_layer<T>(task, backward, tile, geometry, place, row_dots, acc);
    __syncthreads();
    if (row_dots) {
      finish_points<T>(task, backward, tile, geometry, row_dots);
      __syncthreads();  // geometry and row_dots are free for the next tile
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, blocks_an_sm<T>())
    query_backward_kernel(const __grid_constant__ QueryTask task, const __grid_constant__ Saved saved,
                          const __grid_constant__ QueryBackward backward) {
  if constexpr (is_launched<T>()) backward_tiles<T>(task, saved, backward);
}

}  // namespace liif_fast
