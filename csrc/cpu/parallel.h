// PyTorch's threads: work is cut into one fixed share a thread, so that results do not depend on scheduling.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <cstdlib>
#include <new>

namespace liif_fast {

inline int64_t thread_count() { return static_cast<int64_t>(torch::stable::get_num_threads()); }

// f(share, begin, end) for each of `shares` equal parts of [0, count).
template <class F>
void parallel_shares(int64_t count, int64_t shares, const F& f) {
  torch::stable::parallel_for(0, shares, 1, [&](int64_t first, int64_t last) {
    for (int64_t share = first; share < last; ++share) {
      const int64_t begin = count * share / shares, end = count * (share + 1) / shares;
      if (begin < end) f(share, begin, end);
    }
  });
}

// `count` raw blocks of `bytes` each, 64-byte aligned, a block for every thread.
class Blocks {
 public:
  Blocks(int64_t count, size_t bytes)
      : stride_((bytes + 4095) / 4096 * 4096 + 64),  // threads never share a cache line, nor blocks a cache set
        data_(static_cast<char*>(::operator new(stride_* static_cast<size_t>(count), std::align_val_t(64)))) {}
  ~Blocks() { ::operator delete(data_, std::align_val_t(64)); }
  Blocks(const Blocks&) = delete;
  Blocks& operator=(const Blocks&) = delete;
  char* operator[](int64_t index) const { return data_ + stride_ * static_cast<size_t>(index); }

 private:
  size_t stride_;
  char* data_;
};

}  // namespace liif_fast
