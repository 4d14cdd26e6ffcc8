// Replaces CUDA's header of this name: float16 with torch's conversions, which round to nearest even, as CUDA's do.
#pragma once

#include <torch/headeronly/util/Half.h>

using __half = c10::Half;

inline float __half2float(__half value) { return static_cast<float>(value); }
inline __half __float2half_rn(float value) { return __half(value); }
