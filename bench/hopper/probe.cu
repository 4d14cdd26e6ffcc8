// Measurements that guide the design of the Hopper kernel, as a separate program: `probe [launches]` prints JSON.
//
// - rate: wgmma m64n128k16 with A in registers and B resident in shared memory, the tensor cores' rate in this form
// - copy: 1-D bulk copies of 32 KB weight blocks into a ring of six stages, each CTA alone
// - multicast: the same in clusters of two; each CTA fetches half of every block and sends it to both CTAs
// - both: rate and copy at once
// - both_multicast: rate and multicast at once
// - chain: both_multicast with the ReLU between the layers, a whole chain of 64x256 hidden layers as in the decoder
//
// The result of every probe is compared with plain CUDA cores. A block has 384 threads: a producer warpgroup with one
// active thread, and two consumer warpgroups with 64 rows each. A consumer has two accumulators of 128 columns, and its
// activations stay in registers.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "wgmma.cuh"

namespace {

constexpr int kWidth = 256;                         // of a hidden layer
constexpr int kRows = 64;                           // of one consumer warpgroup
constexpr int kBlockK = 64;                         // rows of a weight block: four k16 steps
constexpr int kBlockBytes = kWidth * kBlockK * 2;   // 32 KB
constexpr int kBlocksPerLayer = kWidth / kBlockK;   // 4
constexpr int kLayers = 3;                          // hidden layers after the folded first one
constexpr int kBlocks = kLayers * kBlocksPerLayer;  // 12
constexpr int kStages = 6;                          // of the ring: 192 KB
constexpr int kConsumers = 2;                       // warpgroups
constexpr int kThreads = 128 * (1 + kConsumers);
constexpr int kAccumulators = 64;  // per thread, of a 64x128 tile
constexpr int kSharedBytes = kStages * kBlockBytes + 1024 + 2 * kStages * 8;
static_assert(kSharedBytes <= 227 * 1024, "one block's shared memory");

struct Problem {
  const __nv_bfloat16* weights;      // kBlocks blocks, packed by pack_weights
  const __nv_bfloat16* activations;  // [CTAs * kConsumers][kRows][kWidth]
  float* out;                        // the same shape
  int64_t* cycles;                   // [CTAs], of the consumers' loop
  int tiles;                         // how often the chain of kLayers is run
};

enum class Source { kResident, kCopy, kMulticast };

// The producer's one thread copies one block after the other into the ring, as stages become free.
template <Source kSource>
__device__ void produce(const Problem& problem, char* ring, uint64_t* full, uint64_t* empty) {
  const uint32_t rank = kSource == Source::kMulticast ? cluster_rank() : 0;
  const int steps = kSource == Source::kResident ? kBlocksPerLayer : problem.tiles * kBlocks;
  for (int step = 0; step < steps; ++step) {
    const int stage = step % kStages;
    const char* block = reinterpret_cast<const char*>(problem.weights) + (step % kBlocks) * int64_t{kBlockBytes};
    char* target = ring + stage * kBlockBytes;
    if (step >= kStages) wait_barrier(&empty[stage], (step / kStages - 1) & 1);
    expect_bytes(&full[stage], kBlockBytes);
    if constexpr (kSource == Source::kMulticast) {
      const int half = kBlockBytes / 2;
      copy_bulk_multicast(target + rank * half, block + rank * half, half, &full[stage], 0b11);
    } else {
      copy_bulk(target, block, kBlockBytes, &full[stage]);
    }
  }
}

// Tells the producers that this warp has read a stage: one lane per warp and CTA of the cluster.
template <Source kSource>
__device__ void release(uint64_t* empty) {
  const uint32_t lane = threadIdx.x % 32;
  if constexpr (kSource == Source::kMulticast) {
    if (lane < 2) arrive_remote(empty, lane);
  } else if constexpr (kSource == Source::kCopy) {
    if (lane == 0) arrive(empty);
  }
}

// Makes the A fragments of the next layer from both accumulators: ReLU and rounding in one instruction. Accumulators
// and A have the same layout, so no data moves between threads.
__device__ void activate(const float (&left)[kAccumulators], const float (&right)[kAccumulators],
                         uint32_t (&a)[kWidth / 16][4]) {
#pragma unroll
  for (int k = 0; k < kWidth / 32; ++k) {
#pragma unroll
    for (int part = 0; part < 4; ++part) {
      a[k][part] = pack_relu(left[8 * k + 2 * part], left[8 * k + 2 * part + 1]);
      a[k + kWidth / 32][part] = pack_relu(right[8 * k + 2 * part], right[8 * k + 2 * part + 1]);
    }
  }
}

// Sends the rows of one warpgroup through all layers, `tiles` times.
template <bool kCompute, Source kSource, bool kChain>
__device__ void consume(const Problem& problem, const char* ring, uint64_t* full, uint64_t* empty) {
  const int thread = threadIdx.x % 128, consumer = threadIdx.x / 128 - 1;
  const int row = thread / 32 * 16 + thread % 32 / 4, column = thread % 4 * 2;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kConsumers + consumer) * kRows * kWidth;

  uint32_t a[kWidth / 16][4];
  float left[kAccumulators], right[kAccumulators];
#pragma unroll
  for (int i = 0; i < kAccumulators; ++i) left[i] = right[i] = 0.0f;
  const __nv_bfloat16* source = problem.activations + first + row * kWidth + column;
#pragma unroll
  for (int k = 0; k < kWidth / 16; ++k) {
#pragma unroll
    for (int part = 0; part < 4; ++part) a[k][part] = load_pair(source + part % 2 * 8 * kWidth + k * 16 + part / 2 * 8);
  }

  const int64_t begin = clock64();
  int step = 0, previous = -1;  // previous: the stage whose products may still be running
  for (int tile = 0; tile < problem.tiles; ++tile) {
#pragma unroll
    for (int layer = 0; layer < kLayers; ++layer) {
#pragma unroll
      for (int block = 0; block < kBlocksPerLayer; ++block, ++step) {
        const int stage = kSource == Source::kResident ? block : step % kStages;
        wait_barrier(&full[stage], kSource == Source::kResident ? 0 : (step / kStages) & 1);
        if constexpr (kCompute) {
          const uint64_t b = describe(ring + stage * kBlockBytes);
          fence_registers();
#pragma unroll
          for (int k = 0; k < kBlockK / 16; ++k) {
            const bool add = !(kChain && block == 0 && k == 0);
            // 16 inputs of B are 32 bytes further inside the swizzled 128; the right half starts 16 KB after the left.
            multiply_add(left, a[block * 4 + k], b + 2 * k, add);
            multiply_add(right, a[block * 4 + k], b + 2 * k + (kBlockBytes / 2 >> 4), add);
          }
          commit();
          wait_products<1>();  // eight stay in flight
          if (previous >= 0) release<kSource>(&empty[previous]);
          previous = stage;
        } else {
          release<kSource>(&empty[stage]);
        }
      }
      if constexpr (kCompute) {
        if (!kChain && layer + 1 < kLayers) continue;
        wait_products<0>();
        release<kSource>(&empty[previous]);
        previous = -1;
        if (kChain && (tile + 1 < problem.tiles || layer + 1 < kLayers)) activate(left, right, a);
      }
    }
  }
  const int64_t spent = clock64() - begin;
  if (threadIdx.x == 128) problem.cycles[blockIdx.x] = spent;

  float* out = problem.out + first;
#pragma unroll
  for (int i = 0; i < kAccumulators; ++i) {
    const int64_t offset = (row + i / 2 % 2 * 8) * kWidth + i / 4 * 8 + column + i % 2;
    out[offset] = left[i];
    out[offset + kWidth / 2] = right[i];
  }
}

template <bool kCompute, Source kSource, bool kChain>
__global__ void __launch_bounds__(kThreads, 1) probe_kernel(const __grid_constant__ Problem problem) {
  extern __shared__ char raw[];
  // The swizzle pattern repeats every 1024 bytes, from an address divisible by 1024.
  char* ring = raw + (1024 - shared_address(raw) % 1024) % 1024;
  uint64_t* full = reinterpret_cast<uint64_t*>(ring + kStages * kBlockBytes);
  uint64_t* empty = full + kStages;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      init_barrier(&full[stage], 1);
      init_barrier(&empty[stage], kConsumers * 4 * (kSource == Source::kMulticast ? 2 : 1));
    }
    fence_barrier_init();
  }
  if constexpr (kSource == Source::kMulticast) {
    sync_cluster();
  } else {
    __syncthreads();
  }
  if (threadIdx.x < 128) {
    give_registers<40>();
    if (threadIdx.x == 0) produce<kSource>(problem, ring, full, empty);
  } else {
    take_registers<232>();
    consume<kCompute, kSource, kChain>(problem, ring, full, empty);
  }
  __syncwarp();
  // A CTA must not exit while its neighbor may still write to its shared memory or arrive at its barriers.
  if constexpr (kSource == Source::kMulticast) sync_cluster();
}

// The same products on CUDA cores, one row per block; layers is [kLayers][kWidth out][kWidth in].
__global__ void reference_kernel(const __nv_bfloat16* layers, const __nv_bfloat16* activations, float* out, int tiles,
                                 int repeated_layer, bool chain) {
  __shared__ float x[kWidth];
  const int column = threadIdx.x;
  const int64_t row = blockIdx.x;
  x[column] = __bfloat162float(activations[row * kWidth + column]);
  __syncthreads();
  float sum = 0.0f;
  for (int tile = 0; tile < (chain ? tiles : 1); ++tile) {
    for (int layer = 0; layer < kLayers; ++layer) {
      const __nv_bfloat16* weight = layers + (repeated_layer >= 0 ? repeated_layer : layer) * kWidth * kWidth;
      float value = 0.0f;
      for (int k = 0; k < kWidth; ++k) value += x[k] * __bfloat162float(weight[column * kWidth + k]);
      if (!chain) {
        sum += value * tiles;
        continue;
      }
      __syncthreads();
      sum = value;
      if (tile + 1 < tiles || layer + 1 < kLayers) x[column] = __bfloat162float(__float2bfloat16_rn(fmaxf(value, 0)));
      __syncthreads();
    }
  }
  out[row * kWidth + column] = sum;
}

void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(status));
  std::exit(1);
}

// Packs layers [kLayers][kWidth out][kWidth in] into blocks of 64 inputs: two halves of 128 outputs, 128 swizzled bytes
// per output.
std::vector<__nv_bfloat16> pack_weights(const std::vector<__nv_bfloat16>& layers) {
  std::vector<__nv_bfloat16> packed(layers.size());
  for (int layer = 0; layer < kLayers; ++layer)
    for (int out = 0; out < kWidth; ++out)
      for (int in = 0; in < kWidth; ++in) {
        const int block = layer * kBlocksPerLayer + in / kBlockK;
        packed[block * kWidth * kBlockK + swizzled(out, in % kBlockK)] = layers[(layer * kWidth + out) * kWidth + in];
      }
  return packed;
}

struct Machine {
  int ctas;
  Problem problem;
  __nv_bfloat16* layers;
  float* expected;
  int launches;
};

struct Plan {
  const char* name;
  void (*kernel)(Problem);
  int cluster;
  bool computes, copies, chains;
};

// The launch of `ctas` CTAs in clusters of `cluster`; `attribute` must outlive it.
cudaLaunchConfig_t make_config(int ctas, int cluster, cudaLaunchAttribute& attribute) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(ctas);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = kSharedBytes;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = cluster;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return config;
}

// CTAs that run at the same time in clusters of two. Half the SMs would be too many where a GPC has an odd number.
int resident_ctas(int processors) {
  const auto kernel = probe_kernel<true, Source::kMulticast, true>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes), "shared memory");
  cudaLaunchAttribute attribute = {};
  const cudaLaunchConfig_t config = make_config(processors / 2 * 2, 2, attribute);
  int clusters = 0;
  check(cudaOccupancyMaxActiveClusters(&clusters, kernel, &config), "clusters");
  return clusters * 2;
}

void launch(const Plan& plan, const Machine& machine, const Problem& problem) {
  cudaLaunchAttribute attribute = {};
  const cudaLaunchConfig_t config = make_config(machine.ctas, plan.cluster, attribute);
  check(cudaLaunchKernelEx(&config, plan.kernel, problem), plan.name);
}

// The largest difference from the result of the CUDA cores, as a fraction of the largest value.
double error(const Plan& plan, const Machine& machine, const Problem& problem) {
  const int64_t rows = static_cast<int64_t>(machine.ctas) * kConsumers * kRows;
  reference_kernel<<<static_cast<unsigned>(rows), kWidth>>>(machine.layers, problem.activations, machine.expected,
                                                            problem.tiles, plan.copies ? -1 : 0, plan.chains);
  check(cudaGetLastError(), "reference");
  std::vector<float> found(rows * kWidth), expected(rows * kWidth);
  const size_t bytes = found.size() * sizeof(float);
  check(cudaMemcpy(found.data(), problem.out, bytes, cudaMemcpyDeviceToHost), "result");
  check(cudaMemcpy(expected.data(), machine.expected, bytes, cudaMemcpyDeviceToHost), "reference's result");
  double worst = 0, largest = 1e-30;
  for (size_t i = 0; i < found.size(); ++i) {
    const double difference = std::fabs(static_cast<double>(found[i]) - expected[i]);
    if (!(difference <= worst)) worst = difference;  // NaN counts
    largest = std::max(largest, std::fabs(static_cast<double>(expected[i])));
  }
  return worst / largest;
}

void measure(const Plan& plan, const Machine& machine, bool last) {
  check(cudaFuncSetAttribute(plan.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes), plan.name);
  Problem problem = machine.problem;
  double difference = 0;
  if (plan.computes) {
    problem.tiles = 1;  // after hundreds of passes the values would vanish or overflow
    launch(plan, machine, problem);
    difference = error(plan, machine, problem);
    problem.tiles = machine.problem.tiles;
  }
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin), "event");
  check(cudaEventCreate(&end), "event");
  std::vector<double> seconds;
  for (int i = 0; i < machine.launches + 3; ++i) {
    check(cudaEventRecord(begin), "event");
    launch(plan, machine, problem);
    check(cudaEventRecord(end), "event");
    check(cudaEventSynchronize(end), plan.name);
    float milliseconds = 0;
    check(cudaEventElapsedTime(&milliseconds, begin, end), "event");
    if (i >= 3) seconds.push_back(milliseconds * 1e-3);
  }
  std::sort(seconds.begin(), seconds.end());
  std::vector<int64_t> cycles(machine.ctas);
  check(cudaMemcpy(cycles.data(), problem.cycles, machine.ctas * 8, cudaMemcpyDeviceToHost), "cycles");
  std::sort(cycles.begin(), cycles.end());
  const double steps = static_cast<double>(problem.tiles) * kBlocks;
  const double median = seconds[seconds.size() / 2];
  const double flop = 2.0 * kRows * kWidth * kBlockK * kConsumers * steps * machine.ctas;
  const double bytes = kBlockBytes * steps * machine.ctas;  // as they arrive in shared memory
  std::printf("  \"%s\": {\"seconds\": %.6g, \"p20\": %.6g, \"p80\": %.6g, \"error\": %.3g", plan.name, median,
              seconds[seconds.size() / 5], seconds[seconds.size() * 4 / 5], difference);
  std::printf(", \"cycles_per_block\": %.4g", static_cast<double>(cycles[machine.ctas / 2]) / steps);
  if (plan.computes) std::printf(", \"tflop_per_second\": %.4g", flop / median * 1e-12);
  if (plan.copies) {
    std::printf(", \"arriving_tb_per_second\": %.4g", bytes / median * 1e-12);
    std::printf(", \"read_tb_per_second\": %.4g", bytes / median * 1e-12 / plan.cluster);
  }
  std::printf("}%s\n", last ? "" : ",");
  std::fflush(stdout);
}

}  // namespace

int main(int argc, char** argv) {
  cudaDeviceProp device;
  check(cudaGetDeviceProperties(&device, 0), "device");
  if (device.major != 9) {
    std::fprintf(stderr, "%s is sm_%d%d, these probes are for sm_90a\n", device.name, device.major, device.minor);
    return 2;
  }
  Machine machine = {};
  machine.ctas = resident_ctas(device.multiProcessorCount);
  machine.launches = argc > 1 ? std::max(1, std::atoi(argv[1])) : 20;
  const size_t values = static_cast<size_t>(machine.ctas) * kConsumers * kRows * kWidth;

  std::vector<__nv_bfloat16> layers(kLayers * kWidth * kWidth), activations(values);
  uint32_t state = 1;
  const auto uniform = [&state] {  // in (-1, 1)
    state = state * 1664525u + 1013904223u;
    return static_cast<float>(state >> 8) / 8388608.0f - 1.0f;
  };
  for (auto& weight : layers) weight = __float2bfloat16(uniform() * 0.153f);  // sqrt(6 / 256): signals keep their size
  for (auto& activation : activations) activation = __float2bfloat16(uniform());
  const std::vector<__nv_bfloat16> packed = pack_weights(layers);

  const auto upload = [](const std::vector<__nv_bfloat16>& host) {
    __nv_bfloat16* target = nullptr;
    check(cudaMalloc(&target, host.size() * 2), "memory");
    check(cudaMemcpy(target, host.data(), host.size() * 2, cudaMemcpyHostToDevice), "upload");
    return target;
  };
  machine.layers = upload(layers);
  machine.problem.weights = upload(packed);
  machine.problem.activations = upload(activations);
  machine.problem.tiles = 400;  // 2.4 ms at 800 TFLOP/s
  check(cudaMalloc(&machine.problem.out, values * sizeof(float)), "memory");
  check(cudaMalloc(&machine.expected, values * sizeof(float)), "memory");
  check(cudaMalloc(&machine.problem.cycles, machine.ctas * sizeof(int64_t)), "memory");

  const Plan plans[] = {
      {"rate", probe_kernel<true, Source::kResident, false>, 1, true, false, false},
      {"copy", probe_kernel<false, Source::kCopy, false>, 1, false, true, false},
      {"multicast", probe_kernel<false, Source::kMulticast, false>, 2, false, true, false},
      {"both", probe_kernel<true, Source::kCopy, false>, 1, true, true, false},
      {"both_multicast", probe_kernel<true, Source::kMulticast, false>, 2, true, true, false},
      {"chain", probe_kernel<true, Source::kMulticast, true>, 2, true, true, true},
  };
  const int count = static_cast<int>(sizeof(plans) / sizeof(plans[0]));
  std::printf("{\n  \"device\": \"%s\",\n  \"ctas\": %d,\n", device.name, machine.ctas);
  for (int i = 0; i < count; ++i) measure(plans[i], machine, i + 1 == count);
  std::printf("}\n");
  return 0;
}
