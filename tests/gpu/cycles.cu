// Cycles of the fused decode's phases in one block: `cycles SIDE` renders a map of SIDE x SIDE four times as large, in
// bfloat16 at width 256, and prints JSON. The kernel is the decode's own, with a clock at the borders of the phases;
// its output is compared with that of the kernel without clocks. Weights and latents are arbitrary, since no phase
// depends on their values. It calibrates models of the machine code.
#include "cuda/decode/forward.cuh"
#include "program.h"

namespace liif_fast {
namespace {

constexpr const char* kPhases[] = {"first layer", "hidden layers", "blend and last layer", "output", "geometry"};
constexpr int kHidden = 3, kOuts = 3, kMarks = sizeof(kPhases) / sizeof(*kPhases);

// Writes every warp's clock at the ends of the phases, [tile][phase][warp], of the first block.
struct Clocks {
  long long* next;  // null: not this lane's work
  __device__ __forceinline__ void operator()() {
    if (!next) return;
    *next = clock64();
    next += kWarps;
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads, min_blocks_per_sm<T>())
    clocked_kernel(const __grid_constant__ DecodeTask task, const __grid_constant__ SavedActivations saved,
                   long long* clocks) {
  const bool writes = blockIdx.x == 0 && threadIdx.x % kWarp == 0;
  Clocks marks{writes ? clocks + threadIdx.x / kWarp : nullptr};
  forward_tiles<T, false>(task, saved, marks);
}

template <class T>
void run(int64_t side, int processors) {
  const int64_t size = 4 * side, queries = size * size, chunks = kHidden * T::kGroups * T::kChunkBytes;
  auto* const latents = allocate<uint16_t>(side * side * T::kWidth);
  auto* const packed = allocate<unsigned char>(chunks + packed_vector_count(kHidden, kOuts) * T::kWidth * 4);
  for (int64_t i = 0; i < side * side * T::kWidth; ++i) latents[i] = static_cast<uint16_t>(0x3e00 + i * 7919 % 255);
  for (int64_t i = 0; i < chunks / 2; ++i)
    reinterpret_cast<uint16_t*>(packed)[i] = static_cast<uint16_t>(0x3b00 + i * 104729 % 255 + i % 2 * 0x8000);
  float* const vectors = reinterpret_cast<float*>(packed + chunks);
  for (int i = 0; i < packed_vector_count(kHidden, kOuts) * T::kWidth; ++i)
    vectors[i] = static_cast<float>(i * 31 % 17 - 8) / 64.0f;

  DecodeTask task = {};
  const int64_t sizes[4] = {1, side, side, T::kWidth}, grid[10] = {size, size, 0, 0, size, size, 0, 0, side, side};
  const double cell[2] = {2.0 / static_cast<double>(size), 2.0 / static_cast<double>(size)};
  static_cast<DecodeQueries<float>&>(task) = make_decode_problem<float>(sizes, 0, grid, cell, true);
  task.latent_map = latents;
  task.has_cell = true;
  task.rel_cell[0] = task.rel_cell[1] = 0.5f;
  task.weights = packed;
  task.packed_vectors = vectors;
  task.hidden = kHidden;
  task.outs = kOuts;
  task.total = queries;
  task.tiles = queries * 4 / T::kRows;
  task.out_batch = queries * kOuts;
  task.out_query = 1;
  task.out_channel = queries;
  const unsigned blocks = static_cast<unsigned>(processors < task.tiles ? processors : task.tiles);
  const int64_t tiles = (task.tiles + blocks - 1) / blocks, count = (tiles * kMarks + 1) * kWarps;
  auto* const clocks = allocate<long long>(count);
  float* outs[2];
  constexpr int kBytes = forward_bytes<T>(kOuts);
  for (int clocked = 0; clocked < 2; ++clocked) {
    task.out = outs[clocked] = allocate<float>(queries * kOuts);
    if (!clocked) {
      constexpr auto kKernel = decode_forward_kernel<T, false>;
      check(allow_shared<kKernel>(kBytes));
      check(launch(kKernel, LaunchSize{blocks, kBytes}, nullptr, task, SavedActivations{}));
    } else {
      constexpr auto kKernel = clocked_kernel<T>;
      check(allow_shared<kKernel>(kBytes));
      check(launch(kKernel, LaunchSize{blocks, kBytes}, nullptr, task, SavedActivations{}, clocks));
    }
    finish();
  }
  const bool same = outs[0][0] * 0 == 0 && outs[0][0] != outs[0][1] &&
                    std::memcmp(outs[0], outs[1], static_cast<size_t>(queries * kOuts) * sizeof(float)) == 0;
  std::printf("{\"rows\": %d, \"tiles\": %lld, \"same\": %s, \"cycles\": {", T::kRows, static_cast<long long>(tiles),
              same ? "true" : "false");
  double total = 0;
  for (int phase = 0; phase < kMarks; ++phase) {  // the mean over warps and tiles, without the first tile
    double sum = 0;
    for (int64_t tile = 1; tile < tiles; ++tile)
      for (int warp = 0; warp < kWarps; ++warp) {
        const long long* const end = clocks + ((tile * kMarks + phase + 1) * kWarps + warp);
        sum += static_cast<double>(end[0] - end[-kWarps]);
      }
    sum /= static_cast<double>((tiles - 1) * kWarps);
    total += sum;
    std::printf("\"%s\": %.0f, ", kPhases[phase], sum);
  }
  std::printf("\"tile\": %.0f}}\n", total);
}

}  // namespace
}  // namespace liif_fast

int main(int count, char** arguments) {
  using namespace liif_fast;
  const int side = count == 2 ? std::atoi(arguments[1]) : 256;
  int processors = 0, major = 0, minor = 0;
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, 0));
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0));
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, 0));
  if (has_small_tiles_only(100 * major + 10 * minor))
    run<Tile<MmaPolicy::kBFloat16, 256, 64>>(side, processors);
  else
    run<Tile<MmaPolicy::kBFloat16, 256, 128>>(side, processors);
  return 0;
}
