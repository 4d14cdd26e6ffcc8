// Where a query finds its latents: centers, shifts, nearest indices, relative coordinates, areas, blending weights. The
// kernels of csrc/cpu and csrc/cuda both use it; csrc/bindings fills the problems of decode.h, gather.h and metasr.h.
//
// Every line follows the original's order of operations in the dtype T of the coordinates, because a rounding decides
// which latent is nearest (on odd scales a query lies exactly on a latent's center). FMA contraction is off for the CPU
// (setup.py) and impossible on the GPU (the _rn intrinsics). One axis at a time: rows and columns never mix.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define LIIF_HOST_DEVICE __host__ __device__ __forceinline__
#else
// Internal linkage: each instruction set's translation unit keeps a copy of its own.
#define LIIF_HOST_DEVICE static inline __attribute__((unused))
#endif

namespace liif_fast {

#ifdef __CUDA_ARCH__
LIIF_HOST_DEVICE float add_rounded(float a, float b) { return __fadd_rn(a, b); }
LIIF_HOST_DEVICE double add_rounded(double a, double b) { return __dadd_rn(a, b); }
LIIF_HOST_DEVICE float mul_rounded(float a, float b) { return __fmul_rn(a, b); }
LIIF_HOST_DEVICE double mul_rounded(double a, double b) { return __dmul_rn(a, b); }
#else
LIIF_HOST_DEVICE float add_rounded(float a, float b) { return a + b; }
LIIF_HOST_DEVICE double add_rounded(double a, double b) { return a + b; }
LIIF_HOST_DEVICE float mul_rounded(float a, float b) { return a * b; }
LIIF_HOST_DEVICE double mul_rounded(double a, double b) { return a * b; }
#endif

constexpr double kEpsShift = 1e-6;  // breaks ties between two equally near latents, as in the original
constexpr double kEpsArea = 1e-9;   // keeps the weights finite where all areas vanish

// Pixels along an axis: the center of the first one, and the distance between neighbors.
struct PixelAxis {
  double origin, step;
};

// The axis of `size` pixels that tile [-1, 1]. No member: nvcc's LIIF_HOST_DEVICE does not make it static.
LIIF_HOST_DEVICE PixelAxis image_axis(int64_t size) {
  const double half = 1.0 / static_cast<double>(size);
  return {-1.0 + half, 2.0 * half};
}

// Center of pixel `index` of an axis.
template <class T>
LIIF_HOST_DEVICE T pixel_center(int64_t index, const PixelAxis& axis) {
  return add_rounded(static_cast<T>(axis.origin), mul_rounded(static_cast<T>(axis.step), static_cast<T>(index)));
}

// Center of pixel `index` of `size` pixels that tile [-1, 1].
template <class T>
LIIF_HOST_DEVICE T pixel_center(int64_t index, int64_t size) {
  return pixel_center<T>(index, image_axis(size));
}

// Keeps a coordinate inside the map; NaN stays NaN.
template <class T>
LIIF_HOST_DEVICE T clamp_coord(T coord) {
  const T low = static_cast<T>(-1.0 + 1e-6), high = static_cast<T>(1.0 - 1e-6);
  return coord < low ? low : (coord > high ? high : coord);
}

// Nearest latent of a clamped coordinate, ties to even, as grid_sample(mode="nearest", align_corners=False) rounds.
// Always inside [0, size): NaN maps to 0 (its relative coordinate is NaN anyway).
template <class T>
LIIF_HOST_DEVICE int64_t nearest_index(T coord, int64_t size) {
  const T scaled = mul_rounded(add_rounded(coord, T(1)), static_cast<T>(size));
  const T position = mul_rounded(add_rounded(scaled, T(-1)), T(0.5));
  const T rounded = std::rint(position);
  if (!(rounded > T(0))) return 0;
  return rounded < static_cast<T>(size) ? static_cast<int64_t>(rounded) : size - 1;
}

// Offset of latent `index` of the map in the region [first, first + count) that is in memory. The Python ops check that
// the region covers every latent under a query. Clamp anyway, so that a wrong call cannot read out of bounds.
LIIF_HOST_DEVICE int64_t clamp_to_region(int64_t index, int64_t first, int64_t count) {
  const int64_t local = index - first;
  return local < 0 ? 0 : (local < count ? local : count - 1);
}

// A latent relative to a query, along one axis.
template <class T>
struct Neighbor {
  int64_t index;  // in the whole map
  T rel;          // (coord - center) * size; inside the image |rel| <= 2
};

// The latent on `side` (-1 or +1; 0 without local ensemble) of a query.
template <class T>
LIIF_HOST_DEVICE Neighbor<T> find_neighbor(T coord, int side, int64_t size) {
  T shifted = coord;
  if (side != 0)
    shifted = add_rounded(coord, static_cast<T>(side * (2.0 / static_cast<double>(size) / 2.0) + kEpsShift));
  Neighbor<T> found;
  found.index = nearest_index(clamp_coord(shifted), size);
  found.rel = mul_rounded(add_rounded(coord, -pixel_center<T>(found.index, size)), static_cast<T>(size));
  return found;
}

// For MetaSR: the latent under the query's upper left corner, relative to the latent's own upper left corner.
template <class T>
LIIF_HOST_DEVICE Neighbor<T> find_metasr_neighbor(T coord, T cell, int64_t size) {
  const T corner = add_rounded(coord, -mul_rounded(cell, T(0.5)));
  Neighbor<T> found;
  found.index = nearest_index(clamp_coord(add_rounded(corner, static_cast<T>(kEpsShift))), size);
  const T origin = add_rounded(pixel_center<T>(found.index, size), -static_cast<T>(1.0 / static_cast<double>(size)));
  found.rel = mul_rounded(add_rounded(corner, -origin), static_cast<T>(static_cast<double>(size) / 2.0));
  return found;
}

// Blending weights of the four corners (2*row_side + col_side) from their relative coordinates: each corner gets the
// area between the query and the diagonally opposite corner.
template <class T>
LIIF_HOST_DEVICE void area_weights(const T rel_row[2], const T rel_col[2], T weight[4]) {
  T area[4], total = T(0);
  for (int corner = 0; corner < 4; ++corner) {
    const T product = mul_rounded(rel_row[corner >> 1], rel_col[corner & 1]);
    area[corner] = add_rounded(product < T(0) ? -product : product, static_cast<T>(kEpsArea));
    total = add_rounded(total, area[corner]);
  }
  for (int corner = 0; corner < 4; ++corner) weight[corner] = area[3 - corner] / total;
}

// Blending weight without local ensemble, the original's area / area: 1, or NaN where the area is not finite.
template <class T>
LIIF_HOST_DEVICE T single_corner_weight(T rel_row, T rel_col) {
  return add_rounded(mul_rounded(mul_rounded(rel_row, rel_col), T(0)), T(1));
}

// Adds the gradients of area_weights to those of the relative coordinates.
template <class T>
LIIF_HOST_DEVICE void area_weights_backward(const T rel_row[2], const T rel_col[2], const T grad_weight[4],
                                            T grad_rel_row[2], T grad_rel_col[2]) {
  T weight[4], total = T(0), mean = T(0);
  area_weights(rel_row, rel_col, weight);
  for (int corner = 0; corner < 4; ++corner) {
    const T product = rel_row[corner >> 1] * rel_col[corner & 1];
    total += (product < T(0) ? -product : product) + static_cast<T>(kEpsArea);
    mean += grad_weight[corner] * weight[corner];
  }
  for (int corner = 0; corner < 4; ++corner) {
    const T row = rel_row[corner >> 1], col = rel_col[corner & 1], product = row * col;
    const T sign = product > T(0) ? T(1) : (product < T(0) ? T(-1) : T(0));
    const T grad = (grad_weight[3 - corner] - mean) / total * sign;
    grad_rel_row[corner >> 1] += grad * col;
    grad_rel_col[corner & 1] += grad * row;
  }
}

}  // namespace liif_fast
