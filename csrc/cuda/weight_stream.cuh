// The ring of packed weights in shared memory, for the kernels whose products are those of warps.
#pragma once

#include "cuda/common.cuh"
#include "cuda/ptx.cuh"

namespace liif_fast {

// The barriers of the ring's stages: a chunk has been copied, a chunk has been read.
template <class T>
struct RingBarriers {
  uint64_t full[T::kStages], empty[T::kStages];
};

// Streams packed weights through a ring of chunks in shared memory. All threads of the block copy a part of every chunk
// and read all of it. No barrier of the block stands between chunks: a warp waits until all have copied their parts of
// the chunk that it reads, and until all have read the chunk that its next copies overwrite. So warps may be up to
// kStages - kAhead chunks apart, and one's other work runs under another's products.
template <class T>
class WeightStream {
 public:
  // steps: chunks of one tile, which are repeated for every tile.
  __device__ __forceinline__ WeightStream(const unsigned char* weights, int steps, unsigned char* ring,
                                          RingBarriers<T>& barriers)
      : weights_(weights + threadIdx.x * 16), ring_(ring), barriers_(barriers), bytes_(steps * T::kChunkBytes) {
    if (threadIdx.x < T::kStages) {
      init_barrier(&barriers.full[threadIdx.x], kThreads);
      init_barrier(&barriers.empty[threadIdx.x], kWarps);
    }
    __syncthreads();
    if (steps > 0) {
#pragma unroll
      for (int i = 0; i < kAhead; ++i) copy(i);
    }
  }

  // The current chunk, once it has been copied.
  __device__ __forceinline__ const unsigned char* wait() {
    wait_barrier(&barriers_.full[stage(turn_)], phase(turn_));
    return ring_ + stage(turn_) * T::kChunkBytes;
  }
  // After this warp has read the current chunk: the next one becomes the current one.
  __device__ __forceinline__ void release() {
    __syncwarp();
    if (threadIdx.x % kWarp == 0) arrive(&barriers_.empty[stage(turn_)]);
    turn_ = turn_ + 1 == kTurns ? 0 : turn_ + 1;
  }
  // Once for every chunk, between wait() and release(): copies the chunk that is kAhead later. After the last tile's
  // last chunk the copies go on with the first ones, which nobody reads.
  __device__ __forceinline__ void refill() {
    const int turn = turn_ + kAhead;
    copy(turn < kTurns ? turn : turn - kTurns);
  }
  // No copy may arrive after the block has ended.
  __device__ __forceinline__ void finish() { wait_copies(); }

 private:
  static constexpr int kAhead = 2, kTurns = 2 * T::kStages;

  // A chunk's turn counts the chunks through two rounds of the ring.
  static __device__ __forceinline__ int stage(int turn) { return turn < T::kStages ? turn : turn - T::kStages; }
  static __device__ __forceinline__ uint32_t phase(int turn) { return turn < T::kStages ? 0 : 1; }

  __device__ __forceinline__ void copy(int turn) {
    const unsigned char* const from = weights_ + offset_;
    unsigned char* const to = ring_ + stage(turn) * T::kChunkBytes + threadIdx.x * 16;
    wait_barrier(&barriers_.empty[stage(turn)], phase(turn) ^ 1);
#pragma unroll
    for (int i = 0; i < T::kChunkBytes / (16 * kThreads); ++i) {
      copy_async(to + i * kThreads * 16, from + i * kThreads * 16);
    }
    arrive_after_copies(&barriers_.full[stage(turn)]);
    offset_ = offset_ + T::kChunkBytes == bytes_ ? 0 : offset_ + T::kChunkBytes;
  }

  const unsigned char* weights_;  // this thread's part of the first chunk
  unsigned char* ring_;
  RingBarriers<T>& barriers_;
  int bytes_, offset_ = 0, turn_ = 0;
};

}  // namespace liif_fast
