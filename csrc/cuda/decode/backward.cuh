// The fused decode, backward: from gradients of the outputs to gradients of the latents, tile by tile, with the
// activations that the forward saved. Weight gradients are matrix products over all rows of the gradients written here
// and the saved activations: weights.cuh has those in 16 bits, others are the caller's. Column sums (biases, geometry
// terms, last layer) are computed here.
//
// One thread of one block adds to a column's sum, in a fixed order, so sums repeat bit for bit. Gradients of latents
// are added by atomics in any order, or written row by row for a caller that adds them in a fixed order.
#pragma once

#include "cuda/decode/layers.cuh"

namespace liif_fast {

// Shared memory for gradients of coordinates: per warp column and row, the products of the row's gradient with the four
// geometry terms, and of its hidden vector with the blend's gradient.
constexpr int kRowDots = 5;
template <class T>
constexpr int row_dots_bytes() {
  return T::kWarpCols * T::kRows * kRowDots * 4;
}

// The gradients of the tile's outputs, zeros after the last query: [slot][out].
template <class T>
__device__ __forceinline__ void load_grad_out(const DecodeTask& task, const BackwardArrays& backward, int64_t tile,
                                              const FragmentCoords<T>& coords, float* grad_out) {
  for_each_output<T>(task, tile, coords, [&](int slot, int o, int64_t offset) {
    grad_out[slot * task.outs + o] = offset < 0 ? 0.0f : backward.grad_out[offset];
  });
}

// What weights.cuh rebuilds the rows of the tile from.
template <class T>
__device__ __forceinline__ void store_row_terms(const DecodeTask& task, const BackwardArrays& backward, int64_t tile,
                                                const Geometry<T>& geometry, const FragmentCoords<T>& coords,
                                                const float* grad_out) {
  auto* const to = static_cast<RowTerms*>(backward.row_terms) + (tile - task.first_tile) * T::kRows;
  for (int i = coords.member; i < T::kTeamRows; i += T::kTeamThreads) {
    const int row = coords.team * T::kTeamRows + i, slot = query_slot(row, task.corners);
    float grads[kMostRebuiltOuts];
#pragma unroll
    for (int o = 0; o < kMostRebuiltOuts; ++o)
      grads[o] = o < task.outs ? geometry.weight[row] * grad_out[slot * task.outs + o] : 0.0f;
    to[row].set(geometry.rows[row], make_float4(grads[0], grads[1], grads[2], grads[3]), geometry.rel_cell[row][0],
                geometry.rel_cell[row][1]);
  }
}

// Stores a finished layer's gradients: in act for the next product, in memory for the weights' gradient, in the bias's
// sums.
template <class T, class Values>
__device__ __forceinline__ void store_layer(const DecodeTask& task, const BackwardArrays& backward, int layer,
                                            int64_t tile, const FragmentCoords<T>& coords, unsigned char* act,
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
        if (layer <= backward.stored)
          store_once(row_at<T>(backward.rows, {task.first_tile, task.tiles}, layer - 1, tile, coords.tile_row(m, half),
                               coords.channel(group)),
                     words[half]);
#pragma unroll
        for (int i = 0; i < T::kVector; ++i) column[group][i] += v[i];
      }
      store_act<T>(act, coords.first_row_tile + m, coords.first_group + group, coords.lane, words);
    }
  add_column_sums<T>(task, backward, layer, coords, column);
}

// The gradient of the blended hidden vector of a row's query.
template <class T>
__device__ __forceinline__ void blended_gradient(const DecodeTask& task, const BackwardArrays& backward, int64_t tile,
                                                 const float* grad_out, int slot, int channel, float (&v)[T::kVector]) {
  if (backward.blended) {
    const int64_t at = (tile - task.first_tile) * (T::kRows / task.corners) + slot;
    return load_floats(backward.blended + at * T::kWidth + channel, v);
  }
#pragma unroll
  for (int i = 0; i < T::kVector; ++i) v[i] = 0.0f;
  for (int o = 0; o < task.outs; ++o) {
    const float grad = grad_out[slot * task.outs + o];
    float last[T::kVector];
    load_floats(last_vector<T>(task, o) + channel, last);
#pragma unroll
    for (int i = 0; i < T::kVector; ++i) v[i] = fmaf(grad, last[i], v[i]);
  }
}

// Gradients of the last layer's rows: blended hidden vectors times gradients of the outputs.
template <class T>
__device__ __forceinline__ void last_layer_sums(const DecodeTask& task, const SavedActivations& saved,
                                                const BackwardArrays& backward, int64_t tile,
                                                const FragmentCoords<T>& coords, const float* grad_out) {
  const int corners = task.corners, slots = T::kRows / corners;
  for (int o = 0; o < task.outs; ++o) {
    float column[T::kColGroups][T::kVector] = {};
#pragma unroll
    for (int pair = 0; pair < T::kRowTiles / 2; ++pair)
      for (int sub = 0; sub < (corners == 4 ? 1 : 4); ++sub) {
        const int slot = query_slot(coords.tile_row(2 * pair + sub / 2, sub % 2), corners);
        const float grad = grad_out[slot * task.outs + o];
        if (find_query<T>(task, tile, slot) < 0) continue;  // its hidden vector is undefined
#pragma unroll
        for (int group = 0; group < T::kColGroups; ++group) {
          float v[T::kVector];
          from_words<T>(*saved_blended<T>(saved, tile, slots, slot, coords.channel(group)), v);
#pragma unroll
          for (int i = 0; i < T::kVector; ++i) column[group][i] = fmaf(grad, v[i], column[group][i]);
        }
      }
    __syncwarp();
    add_column_sums<T>(task, backward, task.hidden + 5 + o, coords, column);
  }
}

// acc = gradients of the last hidden layer before its ReLU; with row_dots also the gradient of every row's weight.
template <class T>
__device__ __forceinline__ void through_blend(const DecodeTask& task, const SavedActivations& saved,
                                              const BackwardArrays& backward, int64_t tile, const Geometry<T>& geometry,
                                              const FragmentCoords<T>& coords, const float* grad_out, float* row_dots,
                                              Accumulators<T>& acc) {
  Mask<T> mask;
  mask.load(saved, task.hidden, tile);
  const int warp_col = coords.first_group / T::kColGroups;
#pragma unroll
  for (int pair = 0; pair < T::kRowTiles / 2; ++pair) {
    float dots[4] = {};
#pragma unroll
    for (int group = 0; group < T::kColGroups; ++group) {
      const int channel = coords.channel(group);
      float gradient[T::kVector];
#pragma unroll
      for (int k = 0; k < 4; ++k) {  // the four corners of one query, or four queries
        const int m = 2 * pair + k / 2, half = k % 2, row = coords.tile_row(m, half);
        if (k == 0 || task.corners == 1)
          blended_gradient<T>(task, backward, tile, grad_out, query_slot(row, task.corners), channel, gradient);
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
        const int row = coords.tile_row(2 * pair + k / 2, k % 2);
        if (coords.quad == 0) row_dots[(warp_col * T::kRows + row) * kRowDots + 4] = dot;
      }
    }
  }
}

// Adds the first layer's gradients (in acc) to the latents, and their products with the geometry to its sums.
template <class T>
__device__ __forceinline__ void finish_first_layer(const DecodeTask& task, const BackwardArrays& backward, int64_t tile,
                                                   const Geometry<T>& geometry, const FragmentCoords<T>& coords,
                                                   float* row_dots, const Accumulators<T>& acc) {
  const int warp_col = coords.first_group / T::kColGroups;
#pragma unroll 1
  for (int term = -1; term < 4; ++term) {  // the bias, rel_row, rel_col, and the cell's two
    if (term >= 2 && !task.has_cell) break;
    float column[T::kColGroups][T::kVector] = {};
#pragma unroll
    for (int m = 0; m < T::kRowTiles; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = coords.tile_row(m, half);
        const CornerRow& seen = geometry.rows[row];
        float factor = 1.0f;
        if (term == 0) factor = seen.rel_row;
        if (term == 1) factor = seen.rel_col;
        if (term >= 2) factor = task.cell ? geometry.rel_cell[row][term - 2] : task.rel_cell[term - 2];
        if (find_query<T>(task, tile, query_slot(row, task.corners)) < 0) factor = 0.0f;
#pragma unroll
        for (int group = 0; group < T::kColGroups; ++group) {
          float v[T::kVector];
          get_values<T>(acc, m, group, half, v);
#pragma unroll
          for (int i = 0; i < T::kVector; ++i) column[group][i] = fmaf(factor, v[i], column[group][i]);
        }
      }
    add_column_sums<T>(task, backward, term < 0 ? 0 : task.hidden + 1 + term, coords, column);
    if (row_dots && term >= 0) {
#pragma unroll
      for (int m = 0; m < T::kRowTiles; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float dot = 0.0f;
#pragma unroll
          for (int group = 0; group < T::kColGroups; ++group) {
            float v[T::kVector], vector[T::kVector];
            get_values<T>(acc, m, group, half, v);
            load_floats(geometry_vector<T>(task, term) + coords.channel(group), vector);
#pragma unroll
            for (int i = 0; i < T::kVector; ++i) dot = fmaf(v[i], vector[i], dot);
          }
          dot = sum_over_quad(dot);
          if (coords.quad == 0) row_dots[(warp_col * T::kRows + coords.tile_row(m, half)) * kRowDots + term] = dot;
        }
    }
  }
#pragma unroll
  for (int m = 0; m < T::kRowTiles; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = coords.tile_row(m, half);
      const bool exists = find_query<T>(task, tile, query_slot(row, task.corners)) >= 0;
      const int64_t offset = geometry.rows[row].offset, at = (tile - task.first_tile) * T::kRows + row;
#pragma unroll
      for (int group = 0; group < T::kColGroups; ++group) {
        const int channel = coords.channel(group);
        float v[T::kVector];
        get_values<T>(acc, m, group, half, v);
#pragma unroll
        for (int i = 0; i < T::kVector; i += 4) {
          float4 four = make_float4(v[i], v[i + 1], v[i + 2], v[i + 3]);
          if (!backward.latent_map) {
            if (!exists) four = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            *reinterpret_cast<float4*>(backward.latent_rows + at * T::kWidth + channel + i) = four;
          } else if (exists && channel < task.width) {
            reduce_add(backward.latent_map + offset + channel + i, four);
          }
        }
      }
      if (!backward.latent_map && warp_col == 0 && coords.quad == 0) backward.latent_index[at] = offset / task.width;
    }
}

// The first layer's gradients (in acc) of each query, whose corners one lane holds: those of the query terms.
template <class T>
__device__ __forceinline__ void store_term_gradients(const DecodeTask& task, float* query_term, int64_t tile,
                                                     const FragmentCoords<T>& coords, const Accumulators<T>& acc) {
#pragma unroll
  for (int pair = 0; pair < T::kRowTiles / 2; ++pair)
#pragma unroll
    for (int group = 0; group < T::kColGroups; ++group) {
      const int channel = coords.channel(group);
      float sum[T::kVector];
#pragma unroll
      for (int k = 0; k < 4; ++k) {  // the four corners of one query, or four queries
        float v[T::kVector];
        get_values<T>(acc, 2 * pair + k / 2, group, k % 2, v);
#pragma unroll
        for (int i = 0; i < T::kVector; ++i) sum[i] = k == 0 || task.corners == 1 ? v[i] : sum[i] + v[i];
        if (k < 3 && task.corners == 4) continue;
        const int row = coords.tile_row(2 * pair + k / 2, k % 2);
        const int64_t query = find_query<T>(task, tile, query_slot(row, task.corners));
        if (query < 0 || channel >= task.width) continue;
        float4* const to = reinterpret_cast<float4*>(query_term + query * task.width + channel);
#pragma unroll
        for (int i = 0; i < T::kVector; i += 4) to[i / 4] = make_float4(sum[i], sum[i + 1], sum[i + 2], sum[i + 3]);
      }
    }
}

// Gradients of coord and cell from the rows' products; one thread per query.
template <class T>
__device__ __forceinline__ void finish_points(const DecodeTask& task, const BackwardArrays& backward, int64_t tile,
                                              const Geometry<T>& geometry, const FragmentCoords<T>& coords,
                                              const float* row_dots) {
  const float height = static_cast<float>(task.map_height), width = static_cast<float>(task.map_width);
  const int slots = T::kTeamRows / task.corners;
  for (int i = coords.member; i < slots; i += T::kTeamThreads) {
    const int slot = coords.team * slots + i;
    const int64_t query = find_query<T>(task, tile, slot);
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
__device__ __forceinline__ void backward_tiles(const DecodeTask& task, const SavedActivations& saved,
                                               const BackwardArrays& backward) {
  LIIF_DYNAMIC_SHARED(shared);
  Workspace<T>& space = *reinterpret_cast<Workspace<T>*>(shared);
  Geometry<T>& geometry = space.geometry;
  float* const grad_out = reinterpret_cast<float*>(&space + 1);
  float* const row_dots = backward.coord ? grad_out + T::kRows / task.corners * task.outs : nullptr;

  const FragmentCoords<T> coords;
  WeightStream<T> stream(task.weights, task.hidden * T::kGroups, space.ring, space.barriers);
  for (int64_t tile = task.first_tile + blockIdx.x; tile < task.first_tile + task.tiles; tile += gridDim.x) {
    locate_rows(task, tile, coords, geometry);
    load_grad_out<T>(task, backward, tile, coords, grad_out);
    sync_team<T>(coords);
    if (T::kVector == 8 && backward.row_terms) store_row_terms<T>(task, backward, tile, geometry, coords, grad_out);
    last_layer_sums<T>(task, saved, backward, tile, coords, grad_out);
    Accumulators<T> acc;
    through_blend<T>(task, saved, backward, tile, geometry, coords, grad_out, row_dots, acc);
    for (int layer = task.hidden; layer >= 1; --layer) {
      store_layer<T>(
          task, backward, layer, tile, coords, space.act,
          [&](int m, int group, int half, float (&v)[T::kVector]) { get_values<T>(acc, m, group, half, v); });
#pragma unroll
      for (int m = 0; m < T::kRowTiles; ++m)
#pragma unroll
        for (int n = 0; n < T::kColTiles; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) acc[m][n][i] = 0.0f;
      sync_team<T>(coords);  // act has been written
#pragma unroll 1
      for (int group = 0; group < T::kGroups; ++group) multiply<T>(space.act, stream, group, coords, acc);
      sync_team<T>(coords);  // act has been read
      Mask<T> mask;
      mask.load(saved, layer - 1, tile);
#pragma unroll
      for (int m = 0; m < T::kRowTiles; ++m)
#pragma unroll
        for (int group = 0; group < T::kColGroups; ++group)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            float v[T::kVector];
            get_values<T>(acc, m, group, half, v);
            mask.apply(m, group, half, v);
            set_values<T>(acc, m, group, half, v);
          }
    }
    finish_first_layer<T>(task, backward, tile, geometry, coords, row_dots, acc);
    if (backward.query_term) store_term_gradients<T>(task, backward.query_term, tile, coords, acc);
    sync_team<T>(coords);  // geometry and grad_out have been read, row_dots has been written
    if (row_dots) {
      finish_points<T>(task, backward, tile, geometry, coords, row_dots);
      sync_team<T>(coords);  // geometry and row_dots have been read
    }
  }
  stream.finish();
}

template <class T>
__global__ void __launch_bounds__(kThreads, min_blocks_per_sm<T>())
    decode_backward_kernel(const __grid_constant__ DecodeTask task, const __grid_constant__ SavedActivations saved,
                           const __grid_constant__ BackwardArrays backward) {
  if constexpr (is_launched<T>()) backward_tiles<T>(task, saved, backward);
}

template <MmaPolicy kPolicy>
const char* launch_backward(const DecodeTask& task, const DecodeVariant& variant, const SavedActivations& saved,
                            const BackwardArrays& backward, void* stream) {
  return with_tile<kPolicy>(variant, [&](auto tile) {
    using T = decltype(tile);
    static_assert(T::kWarpRows == warp_rows(T::kRows, T::kWidth, sizeof(typename T::Element)), "as the host counts");
    constexpr auto kKernel = decode_backward_kernel<T>;
    constexpr int kBytes = static_cast<int>(sizeof(Workspace<T>)), kDots = row_dots_bytes<T>();
    if (const char* error = allow_shared<kKernel>(kBytes + T::kRows * kMaxFusedOuts * 4 + kDots)) return error;
    const int bytes = kBytes + T::kRows / task.corners * task.outs * 4 + (backward.coord ? kDots : 0);
    return launch(kKernel, LaunchSize{block_count(variant, task), bytes}, stream, task, saved, backward);
  });
}

}  // namespace liif_fast
