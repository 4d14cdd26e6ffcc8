// Kernels for any processor: 16-byte vectors, which the compiler maps to its instructions.
#define LIIF_SIMD_PORTABLE
#include "cpu/make_table.h"

namespace liif_fast {

const Kernels& portable_kernels() {
  static const Kernels table{"portable", make_table<float>(), make_table<double>()};
  return table;
}

}  // namespace liif_fast
