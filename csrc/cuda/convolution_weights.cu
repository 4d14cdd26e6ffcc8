// The gradient of the folded first layer's 3x3 kernels: sums over pixels (row_product.cuh) of the latent at each of the
// nine taps times the gradient of the pixel. Both operands have 16 bits and a border of zeros. Then a tap is the
// same array, so many rows further on, and no pixel is at a border.
//
// A block multiplies two slots, 64 channels of latents at one tap each, with 256 channels of gradients, over a part of
// the pixels. Blocks of the same pixels are neighbors: what they share comes once from memory.
#include "cuda/common.cuh"
#include "cuda/row_product.cuh"

namespace liif_fast {
namespace {

template <class Element>
using KernelGradsTile = ProductTile<Element, 2 * kLatentStep, kGradStep>;
using Sizes = KernelGradsTile<__half>;  // as with bfloat16
static_assert(Sizes::kRows == kPixelStep);

struct KernelGradsTask : KernelGradsProblem {
  int slots, columns, items;  // taps of 64 latent channels; 256 gradients; blocks of a part
  int parts;
  float* sums;  // [part][item][channel of two slots][gradient]
};

template <class Product>
__global__ void __launch_bounds__(kThreads) kernel_grads_kernel(const __grid_constant__ KernelGradsTask task) {
  LIIF_DYNAMIC_SHARED(shared);
  RowProduct<Product> product(*reinterpret_cast<ProductSpace<Product>*>(shared));
  const StageUnits<Product, Product::kA> units;
  for (int item = static_cast<int>(blockIdx.x); item < task.parts * task.items; item += static_cast<int>(gridDim.x)) {
    const int part = item / task.items, pair = item % task.items / task.columns, column = item % task.columns;
    const RowPart range(task.pixels / Product::kRows, part, task.parts);
    const int64_t row = range.first * Product::kRows;
    // The slot of this thread's channels. After the last one comes the last one again, which nobody reads.
    const int half = units.unit * 8 / kLatentStep, wanted = pair * 2 + half;
    const int slot = wanted < task.slots ? wanted : task.slots - 1, tap = slot % 9;
    const auto* const latents = static_cast<const typename Product::Element*>(task.latents) +
                                (row + tap / 3 * task.row_pixels + tap % 3) * task.latent_channels +
                                (slot / 9 - half) * kLatentStep;
    const auto* const grads =
        static_cast<const typename Product::Element*>(task.grads) + row * task.grad_channels + column * kGradStep;
    ProductSums<Product> sums;
    product.run(range.count, CopiedRows<Product, Product::kA>(latents, task.latent_channels),
                CopiedRows<Product, Product::kB>(grads, task.grad_channels), sums);
    float* const to = task.sums + int64_t{item} * Product::kSums;
    RowProduct<Product>::for_each(
        sums, [&](int a, int b, float2 two) { *reinterpret_cast<float2*>(to + a * Product::kB + b) = two; });
  }
}

// out = the sums over parts.
__global__ void __launch_bounds__(kThreads) add_kernel_grads_kernel(const __grid_constant__ KernelGradsTask task) {
  const int64_t fours = task.outs / 4, count = fours * task.channels * 9;
  for (int64_t i = grid_warp() * kWarp + threadIdx.x % kWarp; i < count; i += grid_warps() * kWarp) {
    const int64_t out = i % fours * 4, channel = i / fours % task.channels, tap = i / fours / task.channels;
    const int64_t slot = channel / kLatentStep * 9 + tap, item = slot / 2 * task.columns + out / kGradStep;
    const int64_t a = slot % 2 * kLatentStep + channel % kLatentStep;
    const float4 sum = add_parts(task.sums + item * Sizes::kSums + a * Sizes::kB + out % kGradStep, task.parts,
                                 int64_t{task.items} * Sizes::kSums);
    float* const to = task.out + (out * task.channels + channel) * 9 + tap;
    const int64_t step = task.channels * 9;
    to[0] = sum.x;
    to[step] = sum.y;
    to[2 * step] = sum.z;
    to[3 * step] = sum.w;
  }
}

// A part for every block that the device runs at a time, of at least four stages.
const char* make_task(const KernelGradsProblem& problem, void* workspace, KernelGradsTask& task) {
  static_cast<KernelGradsProblem&>(task) = problem;
  task.slots = 9 * (problem.latent_channels / kLatentStep);
  task.columns = problem.grad_channels / kGradStep;
  task.items = (task.slots + 1) / 2 * task.columns;
  int device = 0, processors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  const int64_t most = problem.pixels / (4 * Sizes::kRows), wanted = processors / task.items;
  task.parts = static_cast<int>(most < wanted ? most : wanted);
  if (task.parts < 1) task.parts = 1;
  task.sums = static_cast<float*>(workspace);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

int64_t kernel_grads_workspace(const KernelGradsProblem& problem) {
  KernelGradsTask task = {};
  make_task(problem, nullptr, task);
  return int64_t{task.parts} * task.items * Sizes::kSums * 4;
}

const char* launch_kernel_grads(const KernelGradsProblem& problem, void* workspace, void* stream) {
  KernelGradsTask task = {};
  if (const char* error = make_task(problem, workspace, task)) return error;
  const auto run = [&](auto product) {
    using Product = decltype(product);
    constexpr int kBytes = sizeof(ProductSpace<Product>);
    static_assert(kBytes <= 99 << 10, "fits on every GPU");
    if (const char* error = allow_shared<kernel_grads_kernel<Product>>(kBytes)) return error;
    const LaunchSize size{static_cast<unsigned>(task.parts * task.items), kBytes};
    return launch(kernel_grads_kernel<Product>, size, stream, task);
  };
  const char* const error = task.in_bfloat16 ? run(KernelGradsTile<__nv_bfloat16>{}) : run(Sizes{});
  if (error) return error;
  return launch(add_kernel_grads_kernel, blocks_for(task.outs / 4 * task.channels * 9 / kWarp + 1), stream, task);
}

}  // namespace liif_fast
