// The gradient of a 3x3 convolution's kernels: for each of their nine elements a product that sums over the pixels.
//
// A block of pixels is copied to buffers that stay in L2. There the latents have a border, so that a neighbor of a row
// of pixels is another row of the same length, and lie in the panels that the micro-kernel reads. A few rows of the
// gradient meet all nine neighbors before the next ones follow.
#pragma once

#include <cstring>

#include "convolution.h"
#include "cpu/tile.h"

namespace liif_fast {
namespace {

constexpr int64_t kBlockPixels = 192;

template <class T>
struct KernelGradsScratch {
  int64_t rows, cols;             // of a block, in pixels
  int64_t panels, stride, width;  // panels of channels; stride of `grads`; columns of `sums`
  T *latents, *grads;             // [panels, (rows + 2) * (cols + 2), kCols], [rows * cols, stride]
  T* sums;                        // the thread's own: [9, outs, width]
  KernelGradsScratch(const ConvolutionGradsProblem<T>& p, Arena& arena) {
    cols = p.width < kBlockPixels ? p.width : kBlockPixels;
    rows = kBlockPixels / cols < p.height ? kBlockPixels / cols : p.height;
    panels = round_up(p.channels, kCols<T>) / kCols<T>;
    stride = round_up(p.outs, Vec<T>::kLanes) + Vec<T>::kLanes;  // no multiple of 4 KB
    width = panels * kCols<T>;
    latents = arena.take<T>((rows + 2) * (cols + 2) * width);
    grads = arena.take<T>(rows * cols * stride);
    sums = arena.take<T>(9 * p.outs * width);
  }
};

// A block's place in the batch and its size, in pixels.
struct PixelBlock {
  int64_t image, top, left, rows, cols;
  int64_t pixels() const { return (rows + 2) * (cols + 2); }  // with the border
};

// The pixel (row, col) of a block's map, which may be outside, as the panels' pixel `at`.
template <class T>
LIIF_INLINE void copy_latent(const ConvolutionGradsProblem<T>& p, const PixelBlock& block, int64_t row, int64_t col,
                             int64_t at, const KernelGradsScratch<T>& s) {
  const bool inside = row >= 0 && row < p.height && col >= 0 && col < p.width;
  const T* from = p.map + ((block.image * p.height + row) * p.width + col) * p.channels;
  for (int64_t panel = 0; panel < s.panels; ++panel) {
    T* const to = s.latents + (panel * block.pixels() + at) * kCols<T>;
    const int64_t left = p.channels - panel * kCols<T>, count = !inside ? 0 : left < kCols<T> ? left : kCols<T>;
    if (count == kCols<T>)
      std::memcpy(to, from + panel * kCols<T>, sizeof(T) * kCols<T>);
    else
      for (int64_t i = 0; i < kCols<T>; ++i) to[i] = i < count ? from[panel * kCols<T> + i] : T(0);
  }
}

template <class T>
static void copy_block(const ConvolutionGradsProblem<T>& p, const PixelBlock& block, const KernelGradsScratch<T>& s) {
  for (int64_t row = 0, at = 0; row < block.rows + 2; ++row)
    for (int64_t col = 0; col < block.cols + 2; ++col)
      copy_latent(p, block, block.top + row - 1, block.left + col - 1, at++, s);
  for (int64_t row = 0; row < block.rows; ++row)
    for (int64_t col = 0; col < block.cols; ++col) {
      const int64_t pixel = (block.image * p.height + block.top + row) * p.width + block.left + col;
      std::memcpy(s.grads + (row * block.cols + col) * s.stride, p.grad_out + pixel * p.outs,
                  sizeof(T) * static_cast<size_t>(p.outs));
    }
}

// sums += grads^T * latents, for all nine neighbors; every row of pixels is a product of its own.
template <class T>
static void add_products(const ConvolutionGradsProblem<T>& p, const PixelBlock& block, const KernelGradsScratch<T>& s) {
  Gemm<FloatOp<T>, T> g{};
  g.a_stride = s.stride;
  g.b_stride = kCols<T>;
  g.b_panel = block.pixels() * kCols<T>;
  g.c_stride = s.width;
  g.panels = s.panels;
  g.k = block.cols;
  for (int64_t out = 0; out < p.outs; out += kRows) {
    g.m = p.outs - out < kRows ? p.outs - out : kRows;
    for (int neighbor = 0; neighbor < 9; ++neighbor) {
      g.c = s.sums + (neighbor * p.outs + out) * s.width;
      for (int64_t row = 0; row < block.rows; ++row) {
        g.a = s.grads + row * block.cols * s.stride + out;
        g.b = s.latents + ((row + neighbor / 3) * (block.cols + 2) + neighbor % 3) * kCols<T>;
        multiply<FloatOp<T>, true, Start::kAccumulate, Finish::kPlain>(g);
      }
    }
  }
}

// Rows [begin, end) of the batch's maps, into the thread's sums.
template <class T>
static void kernel_grads_rows(const ConvolutionGradsProblem<T>& p, int64_t begin, int64_t end, char* buffer) {
  Arena arena{buffer};
  const KernelGradsScratch<T> s(p, arena);
  for (int64_t i = 0; i < 9 * p.outs * s.width; ++i) s.sums[i] = T(0);
  while (begin < end) {
    const int64_t image = begin / p.height, top = begin % p.height;
    int64_t rows = s.rows < end - begin ? s.rows : end - begin;
    if (rows > p.height - top) rows = p.height - top;
    for (int64_t left = 0; left < p.width; left += s.cols) {
      const PixelBlock block{image, top, left, rows, s.cols < p.width - left ? s.cols : p.width - left};
      copy_block(p, block, s);
      add_products(p, block, s);
    }
    begin += rows;
  }
}

template <class T>
static void add_kernel_grads(const ConvolutionGradsProblem<T>& p, char* buffer) {
  Arena arena{buffer};
  const KernelGradsScratch<T> s(p, arena);
  for (int64_t out = 0; out < p.outs; ++out)
    for (int64_t channel = 0; channel < p.channels; ++channel)
      for (int neighbor = 0; neighbor < 9; ++neighbor)
        p.grad_kernels[(out * p.channels + channel) * 9 + neighbor] +=
            s.sums[(neighbor * p.outs + out) * s.width + channel];
}

}  // namespace
}  // namespace liif_fast
