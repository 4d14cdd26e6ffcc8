#include "cpu/slabs.h"

#include <unistd.h>

#include <algorithm>
#include <mutex>
#include <new>
#include <unordered_map>
#include <vector>

namespace liif_fast {
namespace {

struct Header {
  int64_t tiles, tile_bytes;
};

constexpr std::align_val_t kAlignment{64};

char* allocate(int64_t bytes) { return static_cast<char*>(::operator new(static_cast<size_t>(bytes), kAlignment)); }

struct Slab {
  char* data;
  int64_t bytes;
};

class Pool {
 public:
  char* take(int64_t bytes, int64_t tile_bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto fits = [bytes](const Slab& slab) { return slab.bytes >= bytes && slab.bytes / 2 <= bytes; };
    const auto found = std::find_if(free_.begin(), free_.end(), fits);
    Slab slab{nullptr, bytes};
    int64_t tiles = (bytes - kSlabHeader) / tile_bytes;
    if (found != free_.end()) {
      slab = *found;
      free_.erase(found);
      free_bytes_ -= slab.bytes;
    } else if (used_bytes_ + bytes <= limit_) {
      while (used_bytes_ + free_bytes_ + bytes > limit_) drop_oldest();
      slab.data = allocate(bytes);
    } else {
      slab.data = allocate(bytes);
      slab.bytes = tiles = 0;
    }
    used_bytes_ += slab.bytes;
    used_[slab.data] = slab.bytes;
    *reinterpret_cast<Header*>(slab.data) = {tiles, tile_bytes};
    return slab.data;
  }

  void give_back(char* data) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = used_.find(data);
    const Slab slab{data, found->second};
    used_.erase(found);
    used_bytes_ -= slab.bytes;
    free_.push_back(slab);
    free_bytes_ += slab.bytes;
    if (slab.bytes == 0) drop(free_.end() - 1);
    while (free_bytes_ > 0 && used_bytes_ + free_bytes_ > limit_) drop_oldest();
  }

  void set_limit(int64_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    limit_ = bytes;
    while (!free_.empty()) drop_oldest();
  }

  int64_t limit() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return limit_;
  }

 private:
  void drop_oldest() { drop(free_.begin()); }
  void drop(std::vector<Slab>::iterator slab) {
    free_bytes_ -= slab->bytes;
    ::operator delete(slab->data, kAlignment);
    free_.erase(slab);
  }

  std::mutex mutex_;
  std::unordered_map<char*, int64_t> used_;  // bytes of each slab in use; 0 beyond the limit
  std::vector<Slab> free_;                   // the oldest first
  int64_t used_bytes_ = 0, free_bytes_ = 0;
  int64_t limit_ = std::min<int64_t>(int64_t(1) << 30, int64_t(sysconf(_SC_PHYS_PAGES)) * sysconf(_SC_PAGESIZE) / 8);
};

// Never deleted: tensors that outlive static objects return their slabs.
Pool& pool() {
  static Pool& only = *new Pool;
  return only;
}

}  // namespace

char* take_slab(int64_t bytes, int64_t tile_bytes) { return pool().take(bytes, tile_bytes); }
void return_slab(void* slab) { pool().give_back(static_cast<char*>(slab)); }
int64_t slab_limit() { return pool().limit(); }
void set_slab_limit(int64_t bytes) { pool().set_limit(bytes); }

int64_t slab_bytes(const char* slab) {
  const Header& header = *reinterpret_cast<const Header*>(slab);
  return kSlabHeader + header.tiles * header.tile_bytes;
}

SavedActivations in_slab(char* slab, int64_t tile_bytes) {
  if (!slab) return {};
  const Header& header = *reinterpret_cast<const Header*>(slab);
  return {slab + kSlabHeader, header.tile_bytes == tile_bytes ? header.tiles : 0, tile_bytes};
}

}  // namespace liif_fast
