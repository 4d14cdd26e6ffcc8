// The gradients of the hidden layers' weights in 16 bits: for each layer the sums over rows (row_product.cuh) of the
// gradients after it times the activations before it. All layers are one launch: a block takes one layer, up to 128
// channels of the first operand with all of the second, and a part of the rows.
//
// A first operand may be rebuilt instead of being read, each element once: the last hidden layer's gradients from those
// of the outputs, the blend's weights and the ReLU bits; the first layer's activations, as the forward made them, from
// the latents. Neither is then stored: that saves two writes and two reads of 16 bits for every row and channel.
#pragma once

#include <algorithm>

#include "cuda/decode/layers.cuh"
#include "cuda/row_product.cuh"

namespace liif_fast {

// The channels of the first operand are those of one block.
template <class T>
using WeightsTile = ProductTile<typename T::Element, std::min(T::kWidth, 128), T::kWidth>;

// Vectors of the first operand's channels, in shared memory: registers hold the sums.
constexpr int kMostVectors = 5;
template <class T>
struct ChannelVectors {
  static constexpr int kUnits = WeightsTile<T>::kA / 8;
  float4 halves[kMostVectors][2][kUnits];  // of a unit's eight channels

  __device__ __forceinline__ void set(int vector, int unit, const float (&v)[8]) {
#pragma unroll
    for (int i = 0; i < 2; ++i)
      halves[vector][i][unit] = make_float4(v[4 * i], v[4 * i + 1], v[4 * i + 2], v[4 * i + 3]);
  }
  __device__ __forceinline__ void get(int vector, int unit, float (&v)[8]) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float4 four = halves[vector][i][unit];
      v[4 * i] = four.x;
      v[4 * i + 1] = four.y;
      v[4 * i + 2] = four.z;
      v[4 * i + 3] = four.w;
    }
  }
};

// A block's shared memory.
template <class T>
struct WeightsSpace {
  ProductSpace<WeightsTile<T>> product;
  ChannelVectors<T> vectors;
};

// The activations of the first layer, from float32 latents: the steps of first_layer. Rows of latents are known a stage
// before they are loaded.
template <class T>
class FirstLayerRows {
 public:
  // terms: of the first row, and of kRows rows after the last one. channel: the first one.
  __device__ __forceinline__ FirstLayerRows(const DecodeTask& task, const RowTerms* terms, int channel,
                                            ChannelVectors<T>& vectors)
      : task_(task), vectors_(vectors), terms_(terms + units_.row(0)), channel_(channel + units_.unit * 8) {
    if (units_.first == 0) {
      const FirstVectors<T> mine(task, channel_);
      vectors.set(0, units_.unit, mine.base);
      vectors.set(1, units_.unit, mine.by_row);
      vectors.set(2, units_.unit, mine.by_col);
      if (task.has_cell) {
        vectors.set(3, units_.unit, mine.by_cell_row);
        vectors.set(4, units_.unit, mine.by_cell_col);
      }
    }
    __syncthreads();
    look_ahead();
  }
  __device__ __forceinline__ void begin(unsigned char*) {
#pragma unroll
    for (int i = 0; i < Units::kCount; ++i) {
      latents_[i].load(task_, ahead_[i] + (channel_ < task_.width ? channel_ : 0));
      seen_[i] = terms_[i * Units::kStep].seen;
      if (task_.cell) rel_cell_[i] = *reinterpret_cast<const float2*>(&terms_[i * Units::kStep].rel_cell);
    }
    terms_ += WeightsTile<T>::kRows;
    look_ahead();
  }
  __device__ __forceinline__ void finish(unsigned char* half) {
    FirstVectors<T> vectors;
    vectors_.get(0, units_.unit, vectors.base);
    vectors_.get(1, units_.unit, vectors.by_row);
    vectors_.get(2, units_.unit, vectors.by_col);
    if (task_.cell) {
      vectors_.get(3, units_.unit, vectors.by_cell_row);
      vectors_.get(4, units_.unit, vectors.by_cell_col);
    }
#pragma unroll
    for (int i = 0; i < Units::kCount; ++i) {
      float v[8];
      latents_[i].get(v);
#pragma unroll
      for (int j = 0; j < 8; ++j) v[j] = channel_ < task_.width ? v[j] : 0.0f;
      vectors.finish(task_, seen_[i], &rel_cell_[i].x, v);
      *units_.place(half, i) = to_words<T>(v);
    }
  }

 private:
  using Units = StageUnits<WeightsTile<T>, WeightsTile<T>::kA>;

  __device__ __forceinline__ void look_ahead() {
#pragma unroll
    for (int i = 0; i < Units::kCount; ++i) ahead_[i] = terms_[i * Units::kStep].seen.offset;
  }

  Units units_;
  const DecodeTask& task_;
  const ChannelVectors<T>& vectors_;
  const RowTerms* terms_;
  int channel_;
  CornerRow seen_[Units::kCount];
  int64_t ahead_[Units::kCount];
  LatentWords<T, float> latents_[Units::kCount];
  float2 rel_cell_[Units::kCount];  // with cells of every query
};

// The gradients of the last hidden layer, before its ReLU.
template <class T>
class GradientRows {
 public:
  // terms: of the first row. bits: ReLU bits of the last hidden layer, and the row's number among them. channel: the
  // first one.
  __device__ __forceinline__ GradientRows(const DecodeTask& task, const RowTerms* terms, const uint32_t* bits,
                                          int64_t row, int tile_rows, int channel, ChannelVectors<T>& last)
      : last_(last),
        terms_(terms + units_.row(0)),
        rows_(static_cast<int>(row / WeightsTile<T>::kRows)),
        tile_rows_(tile_rows) {
    channel += units_.unit * 8;
    bits_ = reinterpret_cast<const unsigned char*>(bits) + mask_byte<T>(units_.row(0), channel);
    if (units_.first < kMostRebuiltOuts) {
      float v[8] = {};
      if (units_.first < task.outs) load_floats(last_vector<T>(task, units_.first) + channel, v);
      last.set(units_.first, units_.unit, v);
    }
    __syncthreads();
  }
  __device__ __forceinline__ void begin(unsigned char*) {
    const unsigned char* const bits = bits_ + mask_rows<T>(rows_++, tile_rows_);
#pragma unroll
    for (int i = 0; i < Units::kCount; ++i) {
      grads_[i] = terms_[i * Units::kStep].grads;
      mask_[i] = bits[mask_byte<T>(i * Units::kStep, 0)];
    }
    terms_ += WeightsTile<T>::kRows;
  }
  __device__ __forceinline__ void finish(unsigned char* half) {
    float v[Units::kCount][8] = {};
#pragma unroll
    for (int o = 0; o < kMostRebuiltOuts; ++o) {
      float last[8];
      last_.get(o, units_.unit, last);
#pragma unroll
      for (int i = 0; i < Units::kCount; ++i)
#pragma unroll
        for (int j = 0; j < 8; ++j) v[i][j] = fmaf((&grads_[i].x)[o], last[j], v[i][j]);
    }
#pragma unroll
    for (int i = 0; i < Units::kCount; ++i) {
#pragma unroll
      for (int j = 0; j < 8; ++j)
        if (!(mask_[i] >> j & 1u)) v[i][j] = 0.0f;
      *units_.place(half, i) = to_words<T>(v[i]);
    }
  }

 private:
  using Units = StageUnits<WeightsTile<T>, WeightsTile<T>::kA>;

  Units units_;
  const ChannelVectors<T>& last_;
  const RowTerms* terms_;
  const unsigned char* bits_;  // of the thread's first row and channel
  int rows_, tile_rows_;
  float4 grads_[Units::kCount];
  uint32_t mask_[Units::kCount];
};

template <class T>
__global__ void __launch_bounds__(kThreads)
    decode_weights_kernel(const __grid_constant__ DecodeTask task, const __grid_constant__ SavedActivations saved,
                          const __grid_constant__ BackwardArrays backward, const __grid_constant__ WeightParts parts) {
  using P = WeightsTile<T>;
  LIIF_DYNAMIC_SHARED(shared);
  WeightsSpace<T>& space = *reinterpret_cast<WeightsSpace<T>*>(shared);
  RowProduct<P> product(space.product);
  constexpr int kBlocks = T::kWidth / P::kA;  // of a layer and a part
  const int64_t rows = task.tiles * parts.tile_rows, saved_rows = saved.tiles * parts.tile_rows;
  const int64_t before = (task.first_tile - saved.first_tile) * parts.tile_rows;
  const int units = task.hidden * kBlocks;
  for (int item = static_cast<int>(blockIdx.x); item < parts.parts * units; item += static_cast<int>(gridDim.x)) {
    // Blocks of the same rows are neighbors: what both read comes once from memory.
    const int part = item / units, layer = item % units / kBlocks, channel = item % kBlocks * P::kA;
    const RowPart range(rows / P::kRows, part, parts.parts);
    const int64_t row = range.first * P::kRows;
    const auto* const terms = static_cast<const RowTerms*>(backward.row_terms) + row;
    const auto* const grads = static_cast<const typename T::Element*>(backward.rows) + (layer * rows + row) * T::kWidth;
    const auto* const activations = static_cast<const typename T::Element*>(saved.rows) +
                                    ((layer - saved.first_layer) * saved_rows + before + row) * T::kWidth;
    ProductSums<P> sums;
    if (layer < saved.first_layer) {
      product.run(range.count, FirstLayerRows<T>(task, terms, channel, space.vectors),
                  CopiedRows<P, P::kB>(grads, T::kWidth), sums);
    } else if (layer >= backward.stored) {
      const uint32_t* const bits = saved.masks + task.hidden * (saved_rows * T::kWidth / 32);
      product.run(range.count,
                  GradientRows<T>(task, terms, bits, before + row, parts.tile_rows, channel, space.vectors),
                  CopiedRows<P, P::kB>(activations, T::kWidth), sums);
    } else {
      product.run(range.count, CopiedRows<P, P::kA>(grads + channel, T::kWidth),
                  CopiedRows<P, P::kB>(activations, T::kWidth), sums);
    }
    float* const to = parts.sums + int64_t{item} * P::kSums;
    RowProduct<P>::for_each(sums,
                            [&](int a, int b, float2 two) { *reinterpret_cast<float2*>(to + a * P::kB + b) = two; });
  }
}

template <MmaPolicy kPolicy>
const char* launch_weights(const DecodeTask& task, const DecodeVariant& variant, const SavedActivations& saved,
                           const BackwardArrays& backward, const WeightParts& parts, void* stream) {
  const auto run = [&](auto tile) {
    using T = decltype(tile);
    constexpr auto kKernel = decode_weights_kernel<T>;
    constexpr int kBytes = sizeof(WeightsSpace<T>);
    static_assert(kBytes <= 99 << 10, "fits on every GPU");
    if (const char* error = allow_shared<kKernel>(kBytes)) return error;
    const auto items = static_cast<unsigned>(parts.parts * task.hidden * (T::kWidth / WeightsTile<T>::kA));
    return launch(kKernel, LaunchSize{items, kBytes}, stream, task, saved, backward, parts);
  };
  if (variant.width == 64) return run(Tile<kPolicy, 64, 128>{});
  return variant.width == 128 ? run(Tile<kPolicy, 128, 128>{}) : run(Tile<kPolicy, 256, 128>{});
}

// Outside the namespace, for one policy of 16 bits.
#define LIIF_INSTANTIATE_WEIGHTS(policy)                                                                           \
  template const char* liif_fast::launch_weights<liif_fast::MmaPolicy::policy>(                                    \
      const DecodeTask&, const DecodeVariant&, const SavedActivations&, const BackwardArrays&, const WeightParts&, \
      void*);

}  // namespace liif_fast
