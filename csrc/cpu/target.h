// Compiles the code between BEGIN and END for other instructions than the rest of the file. The standard headers are
// included here, before BEGIN, so that nothing in them is compiled for that target.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#else
#include <arm_neon.h>
#endif

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#define LIIF_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define LIIF_BEGIN_TARGET(features) \
  LIIF_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define LIIF_END_TARGET _Pragma("clang attribute pop")
#else
#define LIIF_BEGIN_TARGET(features) _Pragma("GCC push_options") LIIF_PRAGMA(GCC target(features))
#define LIIF_END_TARGET _Pragma("GCC pop_options")
// GCC 12 warns that the "undefined" operand of its own intrinsics is uninitialized.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
