// Kernels that contain geometry.h's arithmetic and nothing else, and one whose product and sum a compiler may contract.
// test_cuda_build.py reads their PTX.
#include "geometry.h"

namespace liif_fast {

template <class T>
__global__ void geometry_kernel(const T* in, int64_t size, T* out, int64_t* index) {
  const Neighbor<T> liif = find_neighbor(in[0], threadIdx.x ? 1 : -1, size);
  const Neighbor<T> metasr = find_metasr_neighbor(in[1], in[2], size);
  index[0] = liif.index;
  index[1] = metasr.index;
  out[0] = liif.rel;
  out[1] = metasr.rel;
  area_weights(in + 3, in + 5, out + 2);
}

template <class T>
__global__ void control_kernel(const T* in, int64_t, T* out, int64_t*) {
  out[0] = in[0] * in[1] + in[2];
}

template __global__ void geometry_kernel(const float*, int64_t, float*, int64_t*);
template __global__ void geometry_kernel(const double*, int64_t, double*, int64_t*);
template __global__ void control_kernel(const float*, int64_t, float*, int64_t*);

}  // namespace liif_fast
