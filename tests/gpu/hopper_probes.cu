// What limits the Hopper decode's products, by the clock: `hopper_probes TILES` prints JSON, the mean cycles of a group
// of products while both consumers multiply, under one load at a time. A group is multiply_group's eight m64n128k16.
// The tensor cores need 1024 cycles for both consumers' groups. All results are compared with exact sums.
//
// - products: weights stay in shared memory
// - loads_8, loads_32: after each group so many broadcast loads of 16 bytes, like those of biases
// - fill: the ring is filled at the products' rate, and nothing reads it
// - ring: products read the ring; ring_loads_32: with the loads
// - copies: the ring alone
// - narrow: sixteen m64n8k16 instead of a group, the last layer as products
#include "cuda/decode/hopper.cuh"
#include "program.h"

namespace liif_fast {
namespace {

using T = HopperTile<__nv_bfloat16, 4, 3, 3>;
enum class Shape { kNone, kWide, kNarrow };

// kStreams: whether copies fill the ring. kReads: whether products read it; else they read two blocks that stay in
// `first`.
template <bool kStreams_, bool kReads_, int kLoads_, Shape kShape_ = Shape::kWide>
struct Probe {
  static constexpr bool kStreams = kStreams_, kReads = kReads_;
  static constexpr int kLoads = kLoads_;
  static constexpr Shape kShape = kShape_;
};

constexpr int kGroups = T::kHidden * T::kStages;  // of a tile
constexpr uint32_t kResident = T::kStages * T::kBlockBytes;
constexpr int kValues = 128;  // of a consumer's thread: its sums

// A row's activations, which are the same in all channels.
__host__ __device__ constexpr int activation(int row) { return row % 7 - 3; }

struct Sums {
  HalfSums left, right;
  float narrow[4];
};

template <class P, int kStage>
__device__ __forceinline__ void run_group(HopperWorkspace<T>& space, uint32_t parity, uint32_t empty, bool gives,
                                          const HalfOperands& a, Sums& sums, uint32_t& seen) {
  constexpr uint32_t kAt = P::kReads ? kStage * T::kBlockBytes : kResident + kStage % 2 * T::kBlockBytes;
  if constexpr (P::kStreams) wait_barrier(&space.full[kStage], parity);
  if constexpr (P::kShape == Shape::kWide) {
    multiply_group<T, kAt, kStage / 2 == 1>(a, kStage % 2 ? sums.right : sums.left);
    wait_products<1>();
  } else if constexpr (P::kShape == Shape::kNarrow) {
    fence_operands();
    multiply_add<kAt, false>(sums.narrow, a[0], __nv_bfloat16{});
#define LIIF_NARROW(i) \
  multiply_add<kAt + (i) % 8 / 4 * T::kPartBytes + (i) % 4 * 32, true>(sums.narrow, a[(i) % 8], __nv_bfloat16{})
    LIIF_NARROW(1), LIIF_NARROW(2), LIIF_NARROW(3), LIIF_NARROW(4), LIIF_NARROW(5), LIIF_NARROW(6), LIIF_NARROW(7);
    LIIF_NARROW(8), LIIF_NARROW(9), LIIF_NARROW(10), LIIF_NARROW(11), LIIF_NARROW(12), LIIF_NARROW(13);
    LIIF_NARROW(14), LIIF_NARROW(15);
#undef LIIF_NARROW
    commit_products();
    wait_products<0>();
  }
#pragma unroll
  for (int i = 0; i < P::kLoads; ++i) {
    const float4 four = lane_channels(space.biases[i / T::kSteps % 3], i % T::kSteps, reread_thread() % 4);
    seen ^= float_bits(four.x) ^ float_bits(four.y) ^ float_bits(four.z) ^ float_bits(four.w);
  }
  if (P::kStreams && gives) arrive_remote<(kStage + T::kStages - 1) % T::kStages * 8>(empty);
}

// One consumer: its tiles' groups, and the clock around them.
template <class P>
__device__ __forceinline__ void multiply_tiles(const HopperTask& task, HopperWorkspace<T>& space, long long* cycles,
                                               float* values) {
  const int thread = static_cast<int>(threadIdx.x) - kWarpgroup, row = lane_row(thread);
  const uint32_t rank = static_cast<uint32_t>(thread % kWarp);
  const bool gives = rank < cluster_size();
  const uint32_t empty = remote_address(space.empty, gives ? rank : 0);
  HalfOperands a;
#pragma unroll
  for (int k = 0; k < T::kSteps; ++k)
#pragma unroll
    for (int word = 0; word < 4; ++word) {
      const float value = static_cast<float>(activation(row + word % 2 * 8));
      a[k][word] = pack(value, value, __nv_bfloat16{});
    }
  Sums sums = {};
  uint32_t seen = 0, parity = 0;
  wait_barrier(&space.made[0], 0);
  const long long begin = clock64();
  bool has_before = false;
#pragma unroll 1
  for (int tile = static_cast<int>(blockIdx.x); cluster_has(task, tile); tile += static_cast<int>(gridDim.x)) {
#pragma unroll
    for (int layer = 0; layer < T::kHidden; ++layer) {
      run_group<P, 0>(space, parity, empty, gives && has_before, a, sums, seen);
      run_group<P, 1>(space, parity, empty, gives, a, sums, seen);
      run_group<P, 2>(space, parity, empty, gives, a, sums, seen);
      run_group<P, 3>(space, parity, empty, gives, a, sums, seen);
      has_before = true;
      parity ^= 1;
    }
    wait_products<0>();
  }
  const long long end = clock64();
  if (thread % kWarpgroup == 0) cycles[blockIdx.x * T::kConsumers + thread / kWarpgroup] = end - begin;
  float* const to = values + thread * kValues;
#pragma unroll
  for (int i = 0; i < kValues / 2; ++i) {
    const float left = P::kShape == Shape::kNarrow && i < 4 ? sums.narrow[i % 4] : sums.left[i];
    if (blockIdx.x == 0) to[i] = left + bits_float(seen), to[kValues / 2 + i] = sums.right[i];  // seen is 0
  }
}

template <class P>
__global__ void __launch_bounds__(T::kThreads, 1)
    probe_kernel(const __grid_constant__ HopperTask task, long long* cycles, float* values) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  LIIF_DYNAMIC_SHARED(shared);
  HopperWorkspace<T>& space = *reinterpret_cast<HopperWorkspace<T>*>(shared);
  const int thread = static_cast<int>(threadIdx.x);
  for (int i = thread; i < T::kHidden * T::kWidth; i += T::kThreads) space.biases[i / T::kWidth][i % T::kWidth] = 0.0f;
  if (thread == 0) {
    for (int i = 0; i < T::kStages; ++i) {
      init_barrier(&space.full[i], 1);
      init_barrier(&space.empty[i], cluster_size() * T::kConsumers * kWarpgroup / kWarp);
    }
    init_barrier(&space.made[0], 1);
    fence_barrier_init();
  }
  sync_cluster();
  if (thread < kWarpgroup) {
    give_registers<T::kProducerRegisters>();
    if (thread == 0) {
      arrive_and_expect(&space.made[0], 2 * T::kBlockBytes);
      copy_bulk(space.first, task.weights, 2 * T::kBlockBytes, &space.made[0], 1u << cluster_rank());
      if (P::kStreams) stream_weights<T>(task, space);
    }
  } else {
    take_registers<T::kConsumerRegisters>();
    multiply_tiles<P>(task, space, cycles, values);
  }
  __syncwarp();
  sync_cluster();
#endif
}

// Sums over the inputs of a block of weights, for each of its 128 outputs.
float column_sum(const uint16_t* weights, int block, int out) {
  float sum = 0;
  for (int part = 0; part < 2; ++part)
    for (int i = 0; i < 64; ++i) {
      uint16_t bits = weights[(2 * block + part) * (T::kPartBytes / 2) + out * 64 + i];
      sum += bits_float(static_cast<uint32_t>(bits) << 16);
    }
  return sum;
}

template <class P>
bool is_right(const uint16_t* weights, const float* values) {
  if (P::kShape == Shape::kNone) return true;
  for (int thread = 0; thread < T::kConsumers * kWarpgroup; ++thread)
    for (int i = 0; i < kValues; ++i) {
      const int half = i / 64, j = i % 64, row = lane_row(thread) + j / 2 % 2 * 8;
      const int out = j / 4 * 8 + thread % 4 * 2 + j % 2;
      if (P::kShape == Shape::kNarrow && i >= 4) continue;  // of the last group, which has the second block
      const float sum = P::kShape == Shape::kNarrow ? 2 * column_sum(weights, 1, out)
                        : P::kReads ? column_sum(weights, half, out) + column_sum(weights, half + 2, out)
                                    : 2 * column_sum(weights, half, out);
      if (values[thread * kValues + i] != static_cast<float>(activation(row)) * sum) return false;
    }
  return true;
}

struct Run {
  HopperTask task;
  const uint16_t* weights;
  int tiles;  // of a block
  bool right = true;
};

template <class P>
void run(const char* name, Run& it) {
  constexpr auto kKernel = probe_kernel<P>;
  LaunchSize size = {};
  check(find_hopper_launch<kKernel>(T::kThreads, sizeof(HopperWorkspace<T>), size));
  it.task.tiles = int64_t{it.tiles} * size.blocks;
  auto* const cycles = allocate<long long>(size.blocks * T::kConsumers);
  auto* const values = allocate<float>(T::kConsumers * kWarpgroup * kValues);
  double sum = 0;
  for (int warm = 0; warm < 2; ++warm) {  // the second launch is measured
    check(launch(kKernel, size, nullptr, it.task, cycles, values));
    finish();
  }
  for (unsigned i = 0; i < size.blocks * T::kConsumers; ++i) sum += static_cast<double>(cycles[i]);
  it.right = it.right && is_right<P>(it.weights, values);
  std::printf("\"%s\": %.1f, ", name, sum / (size.blocks * T::kConsumers) / (it.tiles * kGroups));
}

}  // namespace
}  // namespace liif_fast

int main(int count, char** arguments) {
  using namespace liif_fast;
  Run it = {};
#ifndef __CUDACC__
  cuda_on_cpu::set_device({2});
#endif
  it.tiles = count == 2 ? std::atoi(arguments[1]) : 400;  // 3 ms at the tensor cores' rate
  constexpr int64_t kLayer = T::kStages * T::kBlockBytes / 2;
  auto* const weights = allocate<uint16_t>(T::kHidden * kLayer);  // the same in all layers
  for (int64_t i = 0; i < T::kHidden * kLayer; ++i)               // integers from -7 to 7
    weights[i] = static_cast<uint16_t>(float_bits(static_cast<float>(i % kLayer * 7919 % 1009 % 15 - 7)) >> 16);
  it.weights = weights;
  it.task.weights = reinterpret_cast<const unsigned char*>(weights);
  it.task.hidden = T::kHidden;
  std::printf("{\"cycles\": {");
  run<Probe<false, false, 0>>("products", it);
  run<Probe<false, false, 8>>("loads_8", it);
  run<Probe<false, false, 32>>("loads_32", it);
  run<Probe<true, false, 0>>("fill", it);
  run<Probe<true, true, 0>>("ring", it);
  run<Probe<true, true, 32>>("ring_loads_32", it);
  run<Probe<true, true, 0, Shape::kNone>>("copies", it);
  run<Probe<false, false, 0, Shape::kNarrow>>("narrow", it);
  std::printf("\"ideal\": 1024}, \"right\": %s}\n", it.right ? "true" : "false");
  return it.right ? 0 : 1;
}
