// The Hopper decode with float16 operands.
#include "cuda/decode/hopper.cuh"

template const char* liif_fast::launch_hopper<liif_fast::MmaPolicy::kWgmmaFloat16>(const HopperTask&, void*);
template const char* liif_fast::launch_hopper_backward<liif_fast::MmaPolicy::kWgmmaFloat16>(const HopperTask&,
                                                                                            const BackwardArrays&,
                                                                                            void*);
