// The fused decode on compute capability 9.0: 128 or 256 channels, 16 bits, products of warpgroups
// (wgmma).
//
// A block has three warpgroups. In the first, the producers, one thread streams weights through a ring in shared
// memory, and three warps make the first layer's activations of the next tile. The other two, the consumers, multiply:
// each has 64 rows, whose activations never leave its registers. Two blocks are a cluster where the device allows it:
// each fetches half of the weights for both.
//
// Inputs and outputs of a layer are halved. `left` and `right` are the sums of outputs 0-127 and 128-255, `low` and
// `high` the activations of inputs 0-127 and 128-255. A layer is four blocks of 128x128 weights, a group of products
// each:
//
//     left = low*W    right = low*W    left += high*W    right += high*W
//
// After the third, `left` is final and `low` is not read again: `left` becomes the next layer's `low` under the fourth,
// and `right` its `high` under the next layer's first. So one group is always under way. Between tiles the last layer
// takes the place of the packing.
//
// With 128 channels a layer is one block of weights, and in inference the halves are rows: `left` and `right` are the
// sums of a consumer's rows 0-63 and 64-127. In training a consumer has one half. Up to four layers stay in the ring.
//
// The order of channels is that of tile.cuh: a lane holds eight consecutive channels of a group of 32. A row's corner
// is 2 * (bit 2 of the row) + (bit 3), so that one lane and the one 16 lanes away hold a query's four corners.
#pragma once

#include <map>
#include <mutex>

#include "cuda/decode/hopper_backward.cuh"

namespace liif_fast {

template <class T>
__device__ __forceinline__ void load_vectors(const HopperTask& task, HopperWorkspace<T>& space) {
  const int thread = static_cast<int>(threadIdx.x);
  // stream_weights brings the biases of layers whose number is no constant; the last one's is kept.
  constexpr int kLoaded = T::kHidden ? T::kHidden : 1, kFirst = T::kBiases - kLoaded;
  const float* const biases = bias_vector<T>(task, T::kHidden ? 1 : task.hidden);
  for (int i = thread; i < kLoaded * T::kWidth; i += T::kThreads)
    space.biases[kFirst + i / T::kWidth][i % T::kWidth] = biases[i];
  for (int i = thread; i < static_cast<int>(sizeof(space.last)) / 4; i += T::kThreads)
    space.last[i / T::kWidth][i % T::kWidth] = i < task.outs * T::kWidth ? last_vector<T>(task, 0)[i] : 0.0f;
  if (thread < task.outs) space.last_bias[thread] = last_vector<T>(task, task.outs)[thread];
  for (int i = thread; i < T::kWidth; i += T::kThreads) {
    const float cell_row = geometry_vector<T>(task, 2)[i], cell_col = geometry_vector<T>(task, 3)[i];
    const float base = bias_vector<T>(task, 0)[i];
    const bool adds_cell = task.has_cell && !task.cell;  // the grid's
    space.base[i] = adds_cell ? fmaf(task.rel_cell[1], cell_col, fmaf(task.rel_cell[0], cell_row, base)) : base;
    space.by_row[i] = geometry_vector<T>(task, 0)[i];
    space.by_col[i] = geometry_vector<T>(task, 1)[i];
    space.by_cell_row[i] = cell_row;
    space.by_cell_col[i] = cell_col;
  }
}

// A block: `make` runs on three warps, `use` on the consumers' warpgroups.
template <class T, class Make, class Use>
__device__ __forceinline__ void run_block(const HopperTask& task, const Make& make, const Use& use) {
  LIIF_DYNAMIC_SHARED(shared);
  HopperWorkspace<T>& space = *reinterpret_cast<HopperWorkspace<T>*>(shared);
  const int thread = static_cast<int>(threadIdx.x);
  load_vectors<T>(task, space);
  if (thread == 0) {
    for (int i = 0; i < T::kStages; ++i) {
      init_barrier(&space.full[i], 1);
      init_barrier(&space.empty[i], cluster_size() * T::kConsumers * kWarpgroup / kWarp);
    }
    for (int i = 0; i < T::kConsumers; ++i) {
      init_barrier(&space.made[i], T::kMakers);
      init_barrier(&space.taken[i], kWarpgroup);
    }
    fence_barrier_init();
  }
  sync_cluster();
  if (thread < kWarpgroup) {
    give_registers<T::kProducerRegisters>();
    if (thread >= kWarp)
      make(space);
    else if (thread == 0)
      stream_weights<T>(task, space);
  } else {
    take_registers<T::kConsumerRegisters>();
    use(space);
  }
  __syncwarp();
  sync_cluster();  // no block ends while another may copy to its memory or arrive at its barriers
}

template <class T>
__global__ void __launch_bounds__(T::kThreads, 1) decode_hopper_kernel(const __grid_constant__ HopperTask task) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  run_block<T>(
      task, [&](HopperWorkspace<T>& space) { make_tiles<T>(task, space); },
      [&](HopperWorkspace<T>& space) {
        if constexpr (T::kHidden)
          consume<T>(task, space);
        else if constexpr (T::kHalvesRows)
          consume_rows<T>(task, space);
        else if constexpr (T::kWidth == T::kHalf)
          consume_and_save<T>(task, space);
        else
          consume_layers<T>(task, space);
      });
#endif
}

template <class T>
__global__ void __launch_bounds__(T::kThreads, 1)
    decode_hopper_backward_kernel(const __grid_constant__ HopperTask task,
                                  const __grid_constant__ BackwardArrays backward) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  run_block<T>(
      task, [&](HopperWorkspace<T>& space) { make_gradients<T>(task, backward, space); },
      [&](HopperWorkspace<T>& space) { propagate<T>(task, backward, space); });
#endif
}

// Blocks that the device runs at a time, in clusters of two where these are nearly as many as single blocks. The driver
// is asked once for each kernel and device.
template <auto kKernel>
const char* find_hopper_launch(int threads, int bytes, LaunchSize& size) {
  static std::mutex mutex;
  static std::map<int, LaunchSize> known;
  const auto failed = [](cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); };
  int device = 0, reserved = 0, clusters[2] = {};
  if (const char* error = failed(cudaGetDevice(&device))) return error;
  const std::lock_guard<std::mutex> lock(mutex);
  if (const auto found = known.find(device); found != known.end()) {
    size = found->second;
    return nullptr;
  }
  if (const char* error = failed(cudaDeviceGetAttribute(&reserved, cudaDevAttrReservedSharedMemoryPerBlock, device)))
    return error;
  if (reserved != static_cast<int>(kSharedBase)) return "this device's shared memory begins at an unknown address";
  if (const char* error = allow_shared<kKernel>(bytes)) return error;
  for (const unsigned cluster : {1u, 2u}) {
    cudaLaunchAttribute attribute = {};
    const cudaLaunchConfig_t config = launch_config({cluster, bytes, threads, cluster}, attribute, nullptr);
    if (const char* error = failed(cudaOccupancyMaxActiveClusters(&clusters[cluster - 1], kKernel, &config)))
      return error;
  }
  const bool pairs = 2 * clusters[1] * 10 >= clusters[0] * 9;
  size = {static_cast<unsigned>(pairs ? 2 * clusters[1] : clusters[0]), bytes, threads, pairs ? 2u : 1u};
  if (size.blocks == 0) return "no block of the Hopper kernel fits on this device";
  known[device] = size;
  return nullptr;
}

template <class T, auto kKernel, class... Arguments>
const char* launch_kernel(void* stream, const HopperTask& task, const Arguments&... arguments) {
  LaunchSize size = {};
  if (const char* error = find_hopper_launch<kKernel>(T::kThreads, sizeof(HopperWorkspace<T>), size)) return error;
  const int64_t wanted = (task.tiles + size.cluster - 1) / size.cluster * size.cluster;
  if (wanted < size.blocks) size.blocks = static_cast<unsigned>(wanted);
  return launch(kKernel, size, stream, task, arguments...);
}

template <class T>
const char* launch_tile(const HopperTask& task, void* stream) {
  return launch_kernel<T, decode_hopper_kernel<T>>(stream, task);
}
template <class T>
const char* launch_backward_tile(const HopperTask& task, const BackwardArrays& backward, void* stream) {
  return launch_kernel<T, decode_hopper_backward_kernel<T>>(stream, task, backward);
}

// f(tile) with the tile that saves.
template <class Element, class F>
const char* with_saving_tile(const HopperTask& task, const F& f) {
  if (task.padded_width == 128)
    return task.corners == 4 ? f(HopperSavingTile<HopperTile<Element, 4, 4, 0, 128>>{})
                             : f(HopperSavingTile<HopperTile<Element, 1, 4, 0, 128>>{});
  return task.corners == 4 ? f(HopperSavingTile<HopperTile<Element, 4, 4, 0>>{})
                           : f(HopperSavingTile<HopperTile<Element, 1, 4, 0>>{});
}

// The paper's decoder has a kernel of its own: with three layers and three outputs, both constants.
template <MmaPolicy kPolicy>
const char* launch_hopper(const HopperTask& task, void* stream) {
  using Element = std::conditional_t<is_float16(kPolicy), __half, __nv_bfloat16>;
  if (task.saved.masks && task.outs > kMaxTrainedOuts) return "the wgmma kernels train with up to 4 outputs";
  if (!task.saved.masks && task.padded_width == 128)
    return task.corners == 4 ? launch_tile<HopperTile<Element, 4, 4, 0, 128>>(task, stream)
                             : launch_tile<HopperTile<Element, 1, 4, 0, 128>>(task, stream);
  if (!task.saved.masks && task.corners == 4 && task.hidden == 3 && task.outs <= 3)
    return launch_tile<HopperTile<Element, 4, 3, 3>>(task, stream);
  return with_saving_tile<Element>(task, [&](auto tile) { return launch_tile<decltype(tile)>(task, stream); });
}

template <MmaPolicy kPolicy>
const char* launch_hopper_backward(const HopperTask& task, const BackwardArrays& backward, void* stream) {
  using Element = std::conditional_t<is_float16(kPolicy), __half, __nv_bfloat16>;
  return with_saving_tile<Element>(
      task, [&](auto tile) { return launch_backward_tile<decltype(tile)>(task, backward, stream); });
}

}  // namespace liif_fast
