// PyTorch's threads. Work is cut into one fixed shard for each thread, so that results do not depend on scheduling.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <new>

namespace liif_fast {

inline int64_t thread_count() { return static_cast<int64_t>(torch::stable::get_num_threads()); }

// f(shard, begin, end) for each of `shards` equal shards of [0, count).
template <class F>
void parallel_shards(int64_t count, int64_t shards, const F& f) {
  torch::stable::parallel_for(0, shards, 1, [&](int64_t first, int64_t last) {
    for (int64_t shard = first; shard < last; ++shard) {
      const int64_t begin = count * shard / shards, end = count * (shard + 1) / shards;
      if (begin < end) f(shard, begin, end);
    }
  });
}

// `count` raw buffers of `bytes` each, 64-byte aligned: usually one per thread.
class ThreadBuffers {
 public:
  ThreadBuffers(int64_t count, size_t bytes)
      : stride_((bytes + 4095) / 4096 * 4096 + 64),  // buffers share no cache line and start in different cache sets
        data_(static_cast<char*>(::operator new(stride_* static_cast<size_t>(count), std::align_val_t(64)))) {}
  ~ThreadBuffers() { ::operator delete(data_, std::align_val_t(64)); }
  ThreadBuffers(const ThreadBuffers&) = delete;
  ThreadBuffers& operator=(const ThreadBuffers&) = delete;
  char* operator[](int64_t index) const { return data_ + stride_ * static_cast<size_t>(index); }

 private:
  size_t stride_;
  char* data_;
};

}  // namespace liif_fast
