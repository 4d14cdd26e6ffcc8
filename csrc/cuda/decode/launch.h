// Launchers of the fused decode, the workspaces their callers own, and the kernels' variants as plain numbers. No CUDA
// and no torch header is needed.
//
// A variant is how products are made, the width that every layer is padded to, and the rows of a tile, of which a
// device's shared memory decides. Every pointer is device memory. As in cuda/launch.h, launchers allocate nothing, wait
// for nothing, and return nullptr or a sentence that says why they failed.
#pragma once

#include <cstdint>

#include "decode.h"
#include "geometry.h"

namespace liif_fast {

constexpr int kMaxFusedWidth = 256;  // of any layer but the last
constexpr int kMaxFusedOuts = 16;    // of the last, see fused_outs
constexpr int kWidthStep = 16;       // widths are multiples of it
constexpr int kRowPadding = 128;     // a multiple of the rows of every variant that saves
constexpr int kMaxTrainedOuts = 4;   // of the wgmma policies in training, with more than 128 channels
constexpr int kHopperRowSums = 8;    // their warps that sum columns
constexpr int kMostRebuiltOuts = 4;  // of the last layer, see rebuilds_last
constexpr int kRowTermsBytes = 48;   // see BackwardArrays::row_terms
constexpr int64_t kMaxWgmmaQueries = int64_t{1} << 30;  // of the batch

// How products are made: the operands' dtype, on tensor cores (kFloat32: on CUDA cores). kWgmma...: by warpgroups, on
// compute capability 9.0.
enum class MmaPolicy { kFloat16, kBFloat16, kTf32, kFloat32, kWgmmaFloat16, kWgmmaBFloat16 };

LIIF_HOST_DEVICE constexpr bool is_wgmma(MmaPolicy policy) {
  return policy == MmaPolicy::kWgmmaFloat16 || policy == MmaPolicy::kWgmmaBFloat16;
}
LIIF_HOST_DEVICE constexpr bool is_float16(MmaPolicy policy) {
  return policy == MmaPolicy::kFloat16 || policy == MmaPolicy::kWgmmaFloat16;
}
// The policy of the backward that computes gradients of coordinates and cells, which has no wgmma.
LIIF_HOST_DEVICE constexpr MmaPolicy points_policy(MmaPolicy policy) {
  return !is_wgmma(policy) ? policy : is_float16(policy) ? MmaPolicy::kFloat16 : MmaPolicy::kBFloat16;
}
LIIF_HOST_DEVICE constexpr bool is_16_bit(MmaPolicy policy) {
  return policy != MmaPolicy::kTf32 && policy != MmaPolicy::kFloat32;
}
LIIF_HOST_DEVICE constexpr int operand_bytes(MmaPolicy policy) { return is_16_bit(policy) ? 2 : 4; }

// -------------------------------------------------------------------------------------------------------------
// variants Constant expressions, so that kernels, launchers and tests all read the same ones.

// Which kernels run a problem on a device. With wgmma and 256 channels, rows are those of the tiles in which the
// forward saves, since the kernels of points_policy read them as well.
struct DecodeVariant {
  MmaPolicy policy;
  int width;     // 64, 128 or 256; by wgmma 128 or 256
  int rows;      // of a tile
  int blocks;    // of the launch: all that the device runs at a time
  int row_sums;  // a block's partial sums of a column, see BackwardArrays::sums
};

LIIF_HOST_DEVICE constexpr int padded_width(int width) { return width <= 64 ? 64 : (width <= 128 ? 128 : 256); }

// Rows of a 256-wide tile where a block may have 160 KB of shared memory, and where it may have 99 KB or the problem
// has fewer tiles than twice the multiprocessors. Weights stream from L2 once a tile, so more rows need fewer bytes.
LIIF_HOST_DEVICE constexpr int large_rows(int operand_bytes) { return operand_bytes == 2 ? 128 : 64; }
LIIF_HOST_DEVICE constexpr int small_rows(int operand_bytes) { return operand_bytes == 2 ? 64 : 32; }
constexpr int kLargeSharedBytes = 160 << 10;

// GPUs of the second kind, by compute capability * 10. Their machine code holds only the small tiles.
LIIF_HOST_DEVICE constexpr bool has_small_tiles_only(int arch) { return (arch > 800 && arch < 900) || arch >= 1200; }

// Blocks that share a multiprocessor with kLargeSharedBytes: one's products run under the other's first layer and
// blend. With 16-bit operands a block of width 128 has twice the rows, and does not fit half of the registers.
LIIF_HOST_DEVICE constexpr int blocks_per_sm(int width, int operand_bytes) {
  return width == 64 || (width == 128 && operand_bytes == 4) ? 2 : 1;
}

// Warp rows of a tile. Each has its own partial sums of a column.
LIIF_HOST_DEVICE constexpr int warp_rows(int rows, int width, int operand_bytes) {
  return rows == 32 ? 1 : (width * operand_bytes < 256 ? 4 : 2);
}

// Outputs that the kernels make. More than kMaxFusedOuts are the caller's product with the blended hidden vectors,
// which the forward writes and whose gradients the backward takes. The wgmma kernels have no such forward.
LIIF_HOST_DEVICE int fused_outs(const DecodeProblem<float>& p) {
  const int64_t outs = p.widths[p.layers];
  return outs <= kMaxFusedOuts ? static_cast<int>(outs) : 0;
}

// Packed vectors of a problem (DecodeTask::packed_vectors), and partial sums of its columns (BackwardArrays::sums).
LIIF_HOST_DEVICE int packed_vector_count(int hidden, int outs) { return hidden + 1 + 4 + outs + 1; }
LIIF_HOST_DEVICE int sum_count(int hidden, int outs) { return hidden + 1 + 4 + outs; }

// What the weights' gradients in 16 bits (weights.cuh) rebuild, so that it is neither stored nor read. The first
// layer's activations, from latents in float32; with one hidden layer its gradients are rebuilt. Gradients of the last
// hidden layer, from those of the outputs.
LIIF_HOST_DEVICE constexpr bool rebuilds_first(MmaPolicy policy, int hidden, bool latent_is_float, bool has_term) {
  return is_16_bit(policy) && hidden > 1 && latent_is_float && !has_term;
}
LIIF_HOST_DEVICE constexpr bool rebuilds_last(MmaPolicy policy, int hidden, int outs) {
  return is_16_bit(policy) && hidden > 0 && outs > 0 && outs <= kMostRebuiltOuts;
}

// 16-byte units of a chunk, and input groups of a layer, each of which is a chunk.
LIIF_HOST_DEVICE int chunk_units(int width) { return width * 64 / 16; }
LIIF_HOST_DEVICE int group_count(MmaPolicy policy, int width) { return width / (is_16_bit(policy) ? 32 : 16); }

// The first weight of a packed 16-byte unit: unit `unit` of the chunk from input group `group`. Each of its four words
// begins `step` inputs after the one before.
struct PackedUnit {
  int out, in, step;
};
// Of wgmma: a layer is blocks of 128 outputs and 128 inputs, in the order of hopper.cuh, each two parts of 64 inputs.
// unit: of the layer. Rows of 128 bytes are swizzled. Outputs and inputs are both in the order of a lane's
// accumulators: output n of a group of 32 is channel n % 8 / 2 * 8 + n / 8 * 2 + n % 2.
LIIF_HOST_DEVICE PackedUnit wgmma_unit(int unit) {
  const int part = unit / 1024, block = part / 2, row = unit / 8 % 128, swizzled = unit % 8 ^ row % 8;
  const int out = block % 2 * 128 + row, in = block / 2 * 128 + part % 2 * 64 + swizzled * 8;
  return {out / 32 * 32 + out % 8 / 2 * 8 + out / 8 % 4 * 2 + out % 2, in / 32 * 32 + in / 8 % 4 * 2, 8};
}
LIIF_HOST_DEVICE PackedUnit packed_unit(MmaPolicy policy, int width, int group, int unit) {
  if (is_wgmma(policy)) return wgmma_unit(group * chunk_units(width) + unit);
  const int vector = is_16_bit(policy) ? 8 : 4;
  const int tiles = vector / 2, channels = 4 * vector, groups = width / channels;
  if (policy == MmaPolicy::kFloat32) {  // [four inputs][out group][tile][e][quad]
    const int quad = unit % 4, e = unit / 4 % 2, tile = unit / 8 % tiles, out_group = unit / 8 / tiles % groups;
    const int four = unit / 8 / tiles / groups;
    return {out_group * channels + quad * vector + tile * 2 + e, group * channels + four * 4, 1};
  }
  // [out group][tile][lane]: the lane's column of the n8 tile, its quad's inputs of both k steps
  const int lane = unit % 32, tile = unit / 32 % tiles, out_group = unit / 32 / tiles, column = lane >> 2;
  return {out_group * channels + (column >> 1) * vector + tile * 2 + (column & 1),
          group * channels + (lane & 3) * vector, is_16_bit(policy) ? 2 : 1};
}

// ------------------------------------------------------------------------------------------------------------
// arguments

// The activations that a forward saves for its backward: arrays over tiles first_tile to first_tile + tiles. Without
// masks it writes only `blended`, if that is not null.
struct SavedActivations {
  void* rows;       // activations [layers][tiles * rows][width], in the operands' dtype, from first_layer on
  void* blended;    // blended hidden vectors [tiles * slots][width]
  uint32_t* masks;  // [layers][tiles][words][threads], a bit for every ReLU
  int64_t first_tile, tiles;
  int first_layer;  // 0; 1 where the first one is rebuilt
  bool last_layer;  // whether rows holds the last hidden layer's activations, for gradients of coordinates
};

// The rows of a problem that a launch decodes: first to first + count, both multiples of kRowPadding. count < 0: all of
// them, without padding.
struct RowRange {
  int64_t first, count;
};

// A problem in the layout that its kernels read. latent_map: floats, or in the operands' 16 bits.
struct DecodeTask : DecodeQueries<float> {
  // In this order the 64-wide backward spills nothing on sm_120, where it has no register to spare. ptxas loads
  // neighboring fields together.
  float rel_cell[2];             // of the grid
  const unsigned char* weights;  // packed chunks of the hidden layers, see packed_unit
  bool latent_is_float;
  const float* packed_vectors;  // of the padded width: biases of the first and the hidden layers, four geometry terms,
                                // the last layer's rows, its bias
  int64_t first_tile, tiles;
  int hidden, outs;  // hidden layers after the first; outputs
  int64_t total;     // queries of the whole batch
};

// The backward's arrays, apart from the saved activations. grad_out has out's strides.
struct BackwardArrays {
  const float* grad_out;
  const float* blended;   // without fused outputs: gradients of blended hidden vectors [tiles * slots][width]
  float* latent_map;      // added to; null in the deterministic order, which needs the next two instead
  float* latent_rows;     // gradients of every row's latent [tiles * rows][width]
  int64_t* latent_index;  // the latent of every row, counted through the map in memory [tiles * rows]
  void* rows;             // gradients before the hidden layers' ReLU [stored][tiles * rows][width], operands' dtype
  int stored;             // hidden layers in rows: all, or all but the last one, see rebuilds_last
  void* row_terms;        // a RowTerms for every row and kRowPadding more; with 16 bits, otherwise null
  // Partial sums over rows, added to: [blocks * row_sums][sum_count][width]: gradients of the biases of the first and
  // the hidden layers, of the four geometry terms, of the last layer's rows.
  float* sums;
  float *coord, *cell;  // [total, 2]; null where no gradient is wanted
  float* query_term;    // [total, task.width]; null without query terms
};

// ------------------------------------------------------------------------------------------------------------
// launchers

// The gradients of the hidden layers' weights as blocks sum them, in `parts` parts of the rows.
struct WeightParts {
  float* sums;  // [parts][hidden][channel of the first operand][channel of the second]
  int parts, width, tile_rows;
  bool transposes_first;  // the first layer's first operand are activations; other layers' are gradients
};

// A variant for the current device and a problem of this many rows; `error` is a sentence where there is none.
DecodeVariant choose_variant(MmaPolicy policy, int width, int64_t total_rows, const char** error);

// Bytes of the packed weights of one direction: chunks, then packed vectors.
int64_t packed_bytes(const DecodeVariant& variant, int hidden, int outs);

// The size of the saved activations.
struct SavedShape {
  int hidden, corners;
  int first_layer;
  bool last_layer;
  RowRange rows;  // count is a multiple of kRowPadding
};
LIIF_HOST_DEVICE SavedShape saved_shape(const DecodeProblem<float>& p, const DecodeVariant& variant,
                                        bool latent_is_float, bool last_layer, const RowRange& rows) {
  const bool rebuilds = rebuilds_first(variant.policy, p.layers - 1, latent_is_float, p.query_term != nullptr);
  return {p.layers - 1, p.corners, rebuilds ? 1 : 0, last_layer, rows};
}
// Bytes of the saved activations, and their arrays in a buffer of that size. The activations come first.
int64_t saved_bytes(const DecodeVariant& variant, const SavedShape& shape);
SavedActivations saved_at(void* buffer, const DecodeVariant& variant, const SavedShape& shape);

// Packs weights and vectors of `problem` into `packed`.
enum class Direction { kForward, kBackward, kBackwardWithPoints };
const char* launch_pack(const DecodeProblem<float>& problem, const DecodeVariant& variant, Direction direction,
                        void* packed, void* stream);

// The task of a problem whose weights are packed.
DecodeTask make_task(const DecodeProblem<float>& problem, const DecodeVariant& variant, const void* packed,
                     bool latent_is_float, const RowRange& rows);

// workspace: of so many bytes, aligned to 16.
int64_t workspace_bytes(const DecodeProblem<float>& problem, const DecodeVariant& variant);
const char* launch_decode_forward(const DecodeTask& task, const DecodeVariant& variant, const SavedActivations& saved,
                                  void* workspace, void* stream);
const char* launch_decode_backward(const DecodeTask& task, const DecodeVariant& variant, const SavedActivations& saved,
                                   const BackwardArrays& backward, void* workspace, void* stream);

// Adds the gradients of the hidden layers' weights, of a backward's rows in 16 bits, to grads [hidden][out][in] of the
// padded width. saved and backward are that backward's. workspace: of weights_bytes, aligned to 16.
int64_t weights_bytes(const DecodeVariant& variant, int hidden, int64_t rows);
const char* launch_decode_weights(const DecodeTask& task, const DecodeVariant& variant, const SavedActivations& saved,
                                  const BackwardArrays& backward, float* grads, void* workspace, void* stream);

// The same for one policy: forward.cuh and backward.cuh define these, one .cu for each policy instantiates them.
template <MmaPolicy kPolicy>
const char* launch_forward(const DecodeTask& task, const DecodeVariant& variant, const SavedActivations& saved,
                           void* stream);
template <MmaPolicy kPolicy>
const char* launch_backward(const DecodeTask& task, const DecodeVariant& variant, const SavedActivations& saved,
                            const BackwardArrays& backward, void* stream);
template <MmaPolicy kPolicy>  // of 16 bits, weights.cuh
const char* launch_weights(const DecodeTask& task, const DecodeVariant& variant, const SavedActivations& saved,
                           const BackwardArrays& backward, const WeightParts& parts, void* stream);

}  // namespace liif_fast
