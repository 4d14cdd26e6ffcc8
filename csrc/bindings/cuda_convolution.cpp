// The folded first layer's convolution on a GPU.
#ifdef LIIF_FAST_WITH_CUDA
#include "bindings/cuda.h"

namespace liif_fast {
namespace {

// map: [batch, height, width, channels]; kernels: [outs, channels, 3, 3], transposed [channels, outs, 3, 3].
Tensor convolution(const Tensor& map, const Tensor& kernels, bool transposed, bool in_bfloat16) {
  check_on_gpu(map, "map", 4);
  STD_TORCH_CHECK(kernels.dim() == 4, "kernels must have 4 dimensions");
  const int32_t device = map.get_device_index();
  const int64_t channels = map.size(3), outs = kernels.size(transposed ? 1 : 0);
  ConvolutionProblem p{};
  p.batch = map.size(0);
  p.height = map.size(1);
  p.width = map.size(2);
  p.channels = channels;
  p.outs = outs;
  p.map = checked<float>(map, "map", device, {p.batch, p.height, p.width, channels});
  p.kernels =
      checked<float>(kernels, "kernels", device, {transposed ? channels : outs, transposed ? outs : channels, 3, 3});
  STD_TORCH_CHECK(channels % 4 == 0 && outs % 4 == 0, "the convolution takes multiples of 4 channels");
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(p.map) % 16 == 0 || map.numel() == 0, "map must be aligned to 16 bytes");
  p.transposed = transposed;
  p.in_bfloat16 = in_bfloat16;
  const DeviceGuard guard(device);
  Tensor out = empty<float>(map, {p.batch, p.height, p.width, outs});
  p.out = data<float>(out);
  Tensor workspace = torch::stable::new_empty(map, {convolution_workspace(p)}, ScalarType::Byte);
  check_launch(launch_convolution(p, workspace.mutable_data_ptr(), current_stream(device)));
  return out;
}

}  // namespace

void register_cuda_convolution(Registry& ops) {
  ops.def("cuda_convolution(Tensor map, Tensor kernels, bool transposed, bool in_bfloat16) -> Tensor");
  ops.impl("CUDA", "cuda_convolution", TORCH_BOX(&convolution));
}

}  // namespace liif_fast
#endif
