// Launchers of the fused decode, and the workspaces their callers own. No CUDA and no torch header is needed.
//
// The kernels come in variants: how products are made, the width that every layer is padded to, and the rows of a tile,
// of which a device's shared memory decides. Every pointer is device memory; as in launch.h, launchers allocate
// nothing, wait for nothing, and return nullptr or a sentence about what went wrong.
#pragma once

#include <cstdint>

#include "decode.h"

namespace liif_fast {

constexpr int kMaxFusedWidth = 256;  // of any layer but the last
constexpr int kMaxFusedOuts = 16;    // of the last
constexpr int kWidthStep = 16;       // widths are multiples of it
constexpr int kRowPadding = 128;     // every variant's tile divides it

enum class Operands { kFloat16, kBFloat16, kTf32, kFloat32 };

inline int operand_bytes(Operands operands) {
  return operands == Operands::kTf32 || operands == Operands::kFloat32 ? 4 : 2;
}

// Which kernels run a problem on a device.
struct QueryVariant {
  Operands operands;
  int width;     // 64, 128 or 256
  int rows;      // of a tile
  int blocks;    // of the launch: all that the device runs at a time
  int row_sums;  // a block's partial sums of a column, see QueryBackward::sums
};

// What a forward keeps for its backward: arrays over tiles first_tile to first_tile + tiles.
struct Saved {
  void* rows;       // activations [layers][tiles * rows][width], in the operands' dtype
  void* blended;    // blended hidden vectors [tiles * slots][width]
  uint32_t* masks;  // [layers][tiles][words][threads]; null: nothing is kept
  int64_t first_tile, tiles;
  bool last_layer;  // whether the last hidden layer's activations are in rows, for gradients of coordinates
};

// A problem as its kernels read it.
struct QueryTask {
  int64_t total, queries;  // of all maps, of one map
  int corners;
  const void* latent_map;  // floats, or in the operands' 16 bits
  bool latent_is_float;
  int64_t latent_width, map_height, map_width, region_top, region_left, region_height, region_width;
  const float *coord, *cell;  // null for a grid; cell: null where all cells are the same
  bool has_cell;
  int64_t image_height, image_width, window_top, window_left, window_width;
  float rel_cell[2];

  int hidden, outs;              // hidden layers after the first; outputs
  const unsigned char* weights;  // packed chunks of the hidden layers, see pack_weights
  const float* lines;            // packed vectors of the padded width: biases of the first and the hidden layers, four
                                 // geometry terms, the last layer's rows, its bias

  float* out;  // null: only what is saved is wanted
  int64_t out_batch, out_query, out_channel;
  int64_t first_tile, tiles;
};

// The backward's arrays beside what the forward saved. grad_out has out's strides.
struct QueryBackward {
  const float* grad_out;
  float* latent_map;       // added to; null in the deterministic order, where rows and places take its part:
  float* latent_rows;      // gradients of every row's latent [tiles * rows][width]
  int64_t* latent_places;  // and which latent of the map that is [tiles * rows]
  void* rows;              // gradients before the hidden layers' ReLU [hidden][tiles * rows][width], operands' dtype
  // Partial sums over rows, added to: [blocks * row_sums][lines][width]; lines: gradients of the biases of the first
  // and the hidden layers, of the four geometry terms, of the last layer's rows.
  float* sums;
  float *coord, *cell;  // [total, 2]; null where nobody asks
};

// A variant for the current device; `error` is a sentence where there is none.
QueryVariant choose_variant(Operands operands, int width, const char** error);

// Bytes of the packed weights of one direction: chunks, then lines.
int64_t packed_bytes(const QueryVariant& variant, int hidden, int outs);

// Bytes of what a forward keeps of `rows` rows (a multiple of kRowPadding), and where it lies in them. The activations
// come first.
int64_t saved_bytes(const QueryVariant& variant, int hidden, int corners, bool last_layer, int64_t rows);
Saved saved_at(void* buffer, const QueryVariant& variant, int hidden, int corners, bool last_layer, int64_t first_row,
               int64_t rows);

// Packs weights and vectors of `problem` into `packed`; transposed: for the backward.
const char* launch_pack(const QueryProblem<float>& problem, const QueryVariant& variant, bool transposed, void* packed,
                        void* stream);

// The task of a problem whose weights are packed: rows first_row to first_row + rows, both multiples of kRowPadding;
// rows < 0: all of them, without padding.
QueryTask make_task(const QueryProblem<float>& problem, const QueryVariant& variant, const void* packed,
                    bool latent_is_float, int64_t first_row, int64_t rows);

const char* launch_query_forward(const QueryTask& task, const QueryVariant& variant, const Saved& saved, void* stream);
const char* launch_query_backward(const QueryTask& task, const QueryVariant& variant, const Saved& saved,
                                  const QueryBackward& backward, void* stream);

}  // namespace liif_fast
