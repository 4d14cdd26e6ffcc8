// Sums over rows (csrc/cuda/row_product.cuh), two parts in one block, as seeds.h runs them.
#include "row_product_probe.h"
#include "seeds.h"

namespace liif_fast {
namespace {

uint64_t run() {
  using T = ProductTile<__nv_bfloat16, 128, 128>;
  constexpr int kRows = 11 * T::kRows, kParts = 2;
  std::mt19937 generator(3);
  std::vector<float> a(kRows * T::kA), sums(kParts * T::kSums);
  std::vector<__nv_bfloat16> b(kRows * T::kB);
  for (float& value : a) value = static_cast<float>(generator() % 101) - 50.0f;
  for (__nv_bfloat16& value : b) value = static_cast<float>(generator() % 101) - 50.0f;
  check(launch(row_product_kernel<T, float>, LaunchSize{1, sizeof(ProductSpace<T>)}, nullptr, a.data(), b.data(),
               int64_t{kRows}, kParts, sums.data()));
  uint64_t hash = 14695981039346656037u;
  add_to_hash(hash, sums);
  return hash;
}

}  // namespace
}  // namespace liif_fast

int main(int count, char** arguments) { return liif_fast::run_seeds(count, arguments, liif_fast::run); }
