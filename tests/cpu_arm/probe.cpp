// A decode and its backward on the NEON kernels, for the emulator of emulator.py: no library, no system call.
#include <cstring>

#include "cpu/dispatch.h"

extern "C" void* memcpy(void* to, const void* from, size_t bytes) {
  for (size_t i = 0; i < bytes; ++i) static_cast<volatile char*>(to)[i] = static_cast<const char*>(from)[i];
  return to;
}
extern "C" void* memset(void* to, int value, size_t bytes) {
  for (size_t i = 0; i < bytes; ++i) static_cast<volatile char*>(to)[i] = static_cast<char>(value);
  return to;
}

namespace liif_fast {
namespace {

struct Sizes {
  int64_t kind;  // 0: float, 1: double, 2: bfloat16 operands, 3: and a bfloat16 latent map in the forward
  int64_t batch, queries, height, width, corners, layers;
  int64_t widths[8];
};

template <class T>
T* take(T*& at, int64_t count) {
  T* const array = at;
  at += count;
  return array;
}

template <class T>
void decode(const Sizes& sizes, const MatrixKernels<T>& common, const DecodeKernels<T>& kernels,
            ForwardTiles<T> forward_tiles, T* in, T* out, char* memory) {
  const int64_t map[4] = {sizes.batch, sizes.height, sizes.width, sizes.widths[0]};
  const int64_t latents = map[0] * map[1] * map[2] * map[3], queries = sizes.batch * sizes.queries;
  DecodeProblem<T> p = make_decode_problem<T>(map, sizes.queries, nullptr, nullptr, sizes.corners == 4);
  DecodeGrads<T> grads{};
  const auto buffer = [&memory](size_t bytes) {
    char* const found = memory;
    memory += (bytes + 63) & ~size_t(63);
    return found;
  };
  p.layers = static_cast<int>(sizes.layers);
  p.has_cell = true;
  p.latent_map = take(in, latents);
  p.coord = take(in, 2 * queries);
  p.cell = take(in, 2 * queries);
  p.weight_geometry = take(in, 4 * p.width);
  for (int layer = 0; layer < p.layers; ++layer) {
    p.widths[layer + 1] = sizes.widths[layer + 1];
    p.weights[layer] = take(in, p.widths[layer] * p.widths[layer + 1]);
  }
  for (int layer = 0; layer <= p.layers; ++layer) p.biases[layer] = take(in, p.widths[layer]);
  grads.grad_out = take(in, queries * p.out_width());
  set_out_layout(p);
  p.out = take(out, queries * p.out_width());
  grads.latent_map = take(out, latents);
  grads.coord = take(out, 2 * queries);
  grads.cell = take(out, 2 * queries);
  grads.weight_geometry = take(out, 4 * p.width);
  for (int layer = 0; layer < p.layers; ++layer)
    grads.weights[layer] = take(out, p.widths[layer] * p.widths[layer + 1]);
  for (int layer = 0; layer <= p.layers; ++layer) grads.biases[layer] = take(out, p.widths[layer]);

  const int64_t each = common.tile_rows / p.corners, tiles = p.batch * ((p.queries + each - 1) / each);
  const int64_t rows = tiles * common.tile_rows, tile_bytes = static_cast<int64_t>(kernels.saved_tile_bytes(p));
  const SavedActivations saved{buffer(static_cast<size_t>(tile_bytes)), 1, tile_bytes};  // the others run again
  char* const packed = buffer(kernels.packed_bytes(p, true));
  char* const sums = buffer(common.sums_bytes(p));
  std::memset(sums, 0, common.sums_bytes(p));
  T* const latent_rows = reinterpret_cast<T*>(buffer(static_cast<size_t>(rows * p.width) * sizeof(T)));
  int64_t* const row_latent = reinterpret_cast<int64_t*>(buffer(static_cast<size_t>(rows) * sizeof(int64_t)));

  DecodeProblem<T> narrow = p;
  if (sizes.kind == 3) {
    uint16_t* const narrow_map = reinterpret_cast<uint16_t*>(buffer(static_cast<size_t>(latents) * 2));
    for (int64_t i = 0; i < latents; ++i)
      std::memcpy(narrow_map + i, reinterpret_cast<const char*>(static_cast<const T*>(p.latent_map) + i) + 2, 2);
    narrow.latent_map = narrow_map;
  }
  kernels.pack(p, false, packed);
  forward_tiles(narrow, packed, 0, tiles, buffer(kernels.forward_scratch_bytes(p)), saved);
  kernels.pack(p, true, packed);
  char* const scratch = buffer(kernels.backward_scratch_bytes(p));
  kernels.backward_tiles(p, grads, {0, tiles, 0, packed, scratch, sums, latent_rows, row_latent}, saved);
  common.scatter_rows(latent_rows, row_latent, rows, p.width, 0, 1, grads.latent_map);
  common.add_sums(p, sums, grads);
}

}  // namespace
}  // namespace liif_fast

extern "C" void probe(const liif_fast::Sizes* sizes, void* in, void* out, char* memory) {
  using namespace liif_fast;
  const Kernels& neon = neon_kernels();
  const Bf16Kernels& bf16 = neon_bf16_kernels();
  if (sizes->kind == 1)
    return decode<double>(*sizes, neon.double_kernels, neon.double_kernels, neon.double_kernels.forward_tiles,
                          static_cast<double*>(in), static_cast<double*>(out), memory);
  const bool narrow = sizes->kind > 1;
  const DecodeKernels<float>& kernels = narrow ? static_cast<const DecodeKernels<float>&>(bf16) : neon.float_kernels;
  decode<float>(*sizes, neon.float_kernels, kernels,
                sizes->kind == 3 ? bf16.forward_tiles_bf16_map : kernels.forward_tiles, static_cast<float*>(in),
                static_cast<float*>(out), memory);
}
