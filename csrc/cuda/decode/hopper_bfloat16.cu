// The Hopper decode with bfloat16 operands.
#include "cuda/decode/hopper.cuh"

template const char* liif_fast::launch_hopper<liif_fast::MmaPolicy::kWgmmaBFloat16>(const HopperTask&, void*);
template const char* liif_fast::launch_hopper_backward<liif_fast::MmaPolicy::kWgmmaBFloat16>(const HopperTask&,
                                                                                             const BackwardArrays&,
                                                                                             void*);
