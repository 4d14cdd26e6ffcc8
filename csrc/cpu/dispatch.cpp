// Which instruction set's kernels run on this processor.
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/dispatch.h"

#if defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#elif defined(__aarch64__)
#include <sys/auxv.h>
#endif

namespace liif_fast {
namespace {

#if defined(__aarch64__)
// Whether this ARM processor has FEAT_BF16.
bool multiplies_bf16() {
#if defined(__APPLE__)
  int has = 0;
  size_t bytes = sizeof has;
  return sysctlbyname("hw.optional.arm.FEAT_BF16", &has, &bytes, nullptr, 0) == 0 && has;
#else
  constexpr unsigned long kBf16 = 1ul << 14;  // HWCAP2_BF16, which old headers do not name
  return getauxval(AT_HWCAP2) & kBf16;
#endif
}
#endif

// The value of LIIF_FAST_CPU_ISA when the extension was loaded; a later change of the environment has no effect.
const std::string cap = [] {
  const char* value = std::getenv("LIIF_FAST_CPU_ISA");
  return std::string(value && *value ? value : "auto");
}();

// The kernels that may run here, from the smallest instruction set to the largest: those of this processor, up to cap.
std::vector<const Kernels*> find_kernels() {
  std::vector<const Kernels*> found{&portable_kernels()};
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx2) found.push_back(&avx2_kernels());
  if (avx512) found.push_back(&avx512_kernels());
#elif defined(__aarch64__)
  found.push_back(&neon_kernels());
#endif
  if (cap == "auto") return found;
  std::string names;
  for (size_t i = 0; i < found.size(); ++i) {
    if (found[i]->name == cap) return {found.begin(), found.begin() + static_cast<std::ptrdiff_t>(i) + 1};
    names += std::string(", ") + found[i]->name;
  }
  const bool known = cap == "avx2" || cap == "avx512" || cap == "neon";
  throw std::runtime_error("LIIF_FAST_CPU_ISA is '" + cap + "'" + (known ? ", which this processor lacks" : "") +
                           ": set it to one of auto" + (known ? names : ", avx512, avx2, neon, portable"));
}

const std::vector<const Kernels*>& allowed_kernels() {
  static const std::vector<const Kernels*> allowed = find_kernels();
  return allowed;
}

std::atomic<const Kernels*> selected{nullptr};

}  // namespace

const Kernels& kernels() {
  const Kernels* chosen = selected.load(std::memory_order_relaxed);
  return chosen ? *chosen : *allowed_kernels().back();
}

const Bf16Kernels* bf16_kernels() {
#if defined(__x86_64__)
  static const bool runs = __builtin_cpu_supports("avx512bf16");
  if (runs && std::strcmp(kernels().name, "avx512") == 0) return &avx512_bf16_kernels();
#elif defined(__aarch64__)
  static const bool runs = multiplies_bf16();
  if (runs && std::strcmp(kernels().name, "neon") == 0) return &neon_bf16_kernels();
#endif
  return nullptr;
}

bool select_kernels(const char* name) {
  for (const Kernels* candidate : allowed_kernels()) {
    if (std::strcmp(name, candidate->name) != 0) continue;
    selected.store(candidate, std::memory_order_relaxed);
    return true;
  }
  if (std::strcmp(name, "auto") != 0) return false;
  selected.store(nullptr, std::memory_order_relaxed);
  return true;
}

}  // namespace liif_fast
