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

// latents: [pixels + 2 * row_pixels + 2, padded channels]; grads: [pixels, padded outs]; bfloat16 or float16.
Tensor kernel_grads(const Tensor& latents, const Tensor& grads, int64_t row_pixels, int64_t channels, int64_t outs) {
  check_on_gpu(latents, "latents", 2);
  STD_TORCH_CHECK(grads.dim() == 2 && row_pixels > 0, "grads must have 2 dimensions, and rows pixels");
  const int32_t device = latents.get_device_index();
  KernelGradsProblem p{};
  p.pixels = grads.size(0);
  p.row_pixels = row_pixels;
  p.in_bfloat16 = latents.scalar_type() == ScalarType::BFloat16;
  const int64_t latent_channels = (channels + kLatentStep - 1) / kLatentStep * kLatentStep;
  const int64_t grad_channels = (outs + kGradStep - 1) / kGradStep * kGradStep;
  STD_TORCH_CHECK(channels > 0 && channels <= kMaxConvolutionChannels && outs > 0 && outs <= kMaxConvolutionChannels &&
                      outs % 4 == 0 && p.pixels % kPixelStep == 0,
                  "channels, outs or pixels are out of range");
  for (const auto& [tensor, name, sizes] :
       {std::make_tuple(&latents, "latents", Sizes{p.pixels + 2 * row_pixels + 2, latent_channels}),
        std::make_tuple(&grads, "grads", Sizes{p.pixels, grad_channels})}) {
    check_contiguous(*tensor, name, device, sizes);
    STD_TORCH_CHECK(tensor->scalar_type() == (p.in_bfloat16 ? ScalarType::BFloat16 : ScalarType::Half), name,
                    " must be bfloat16 or float16, as the other one");
    STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(tensor->const_data_ptr()) % 16 == 0, name,
                    " must be aligned to 16 bytes");
  }
  p.latent_channels = static_cast<int>(latent_channels);
  p.grad_channels = static_cast<int>(grad_channels);
  p.channels = channels;
  p.outs = outs;
  p.latents = latents.const_data_ptr();
  p.grads = grads.const_data_ptr();
  const DeviceGuard guard(device);
  Tensor out = empty<float>(latents, {outs, channels, 3, 3});
  p.out = data<float>(out);
  Tensor workspace = torch::stable::new_empty(latents, {kernel_grads_workspace(p)}, ScalarType::Byte);
  check_launch(launch_kernel_grads(p, workspace.mutable_data_ptr(), current_stream(device)));
  return out;
}

}  // namespace

void register_cuda_convolution(Registry& ops) {
  ops.def("cuda_convolution(Tensor map, Tensor kernels, bool transposed, bool in_bfloat16) -> Tensor");
  ops.def("cuda_kernel_grads(Tensor latents, Tensor grads, int row_pixels, int channels, int outs) -> Tensor");
  ops.impl("CUDA", "cuda_convolution", TORCH_BOX(&convolution));
  ops.impl("CUDA", "cuda_kernel_grads", TORCH_BOX(&kernel_grads));
}

}  // namespace liif_fast
#endif
