// In the place of the decode's kernels for float16 and TF32: the module compiles in two thirds of the time without.
#include "cuda/decode/neighbors.cuh"
#include "cuda/decode/tile.cuh"

namespace liif_fast {

constexpr char kLeftOut[] = "the emulator was compiled without float16 and TF32: mark this test `prove`";

template <MmaPolicy kPolicy>
const char* launch_forward(const DecodeTask&, const DecodeVariant&, const SavedActivations&, void*) {
  return kLeftOut;
}
template <MmaPolicy kPolicy>
const char* launch_backward(const DecodeTask&, const DecodeVariant&, const SavedActivations&, const BackwardArrays&,
                            void*) {
  return kLeftOut;
}
template <MmaPolicy kPolicy>
const char* launch_weights(const DecodeTask&, const DecodeVariant&, const SavedActivations&, const BackwardArrays&,
                           const WeightParts&, void*) {
  return kLeftOut;
}
template <MmaPolicy kPolicy>
const char* launch_hopper(const HopperTask&, void*) {
  return kLeftOut;
}
template <MmaPolicy kPolicy>
const char* launch_hopper_backward(const HopperTask&, const BackwardArrays&, void*) {
  return kLeftOut;
}
template const char* launch_weights<MmaPolicy::kFloat16>(const DecodeTask&, const DecodeVariant&,
                                                         const SavedActivations&, const BackwardArrays&,
                                                         const WeightParts&, void*);
template const char* launch_hopper<MmaPolicy::kWgmmaFloat16>(const HopperTask&, void*);
template const char* launch_hopper_backward<MmaPolicy::kWgmmaFloat16>(const HopperTask&, const BackwardArrays&, void*);

}  // namespace liif_fast

LIIF_INSTANTIATE_DECODE(kFloat16)
LIIF_INSTANTIATE_DECODE(kTf32)
