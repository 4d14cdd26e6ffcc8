// Which instruction set's kernels run on this processor.
#include <atomic>
#include <cstring>

#include "cpu/kernels.h"

namespace liif_fast {
namespace {

#if defined(__x86_64__)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
bool has_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif

const Kernels* best_kernels() {
#if defined(__x86_64__)
  if (has_avx512()) return &avx512_kernels();
  if (has_avx2()) return &avx2_kernels();
#endif
  return &portable_kernels();
}

std::atomic<const Kernels*> selected{nullptr};

}  // namespace

const Kernels& kernels() {
  const Kernels* chosen = selected.load(std::memory_order_relaxed);
  static const Kernels* const best = best_kernels();
  return chosen ? *chosen : *best;
}

const Bf16Kernels* bf16_kernels() {
#if defined(__x86_64__)
  static const bool runs = has_bf16();
  if (runs && std::strcmp(kernels().name, "avx512") == 0) return &avx512_bf16_kernels();
#endif
  return nullptr;
}

bool select_kernels(const char* name) {
  const Kernels* chosen = nullptr;
  if (std::strcmp(name, "auto") == 0) {
    chosen = best_kernels();
  } else if (std::strcmp(name, "portable") == 0) {
    chosen = &portable_kernels();
#if defined(__x86_64__)
  } else if (std::strcmp(name, "avx2") == 0 && has_avx2()) {
    chosen = &avx2_kernels();
  } else if (std::strcmp(name, "avx512") == 0 && has_avx512()) {
    chosen = &avx512_kernels();
#endif
  }
  if (chosen) selected.store(chosen, std::memory_order_relaxed);
  return chosen != nullptr;
}

}  // namespace liif_fast
