// The gradient of a 3x3 convolution's kernels, in plain sizes and pointers: the folded first layer's.
#pragma once

#include <cstdint>

namespace liif_fast {

template <class T>
struct ConvolutionGradsProblem {
  int64_t batch, height, width, channels, outs;
  const T* map;       // [batch, height, width, channels], zero outside
  const T* grad_out;  // [batch, height, width, outs]
  T* grad_kernels;    // [outs, channels, 3, 3]
};

}  // namespace liif_fast
