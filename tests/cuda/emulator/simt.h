// Runs CUDA kernels on the CPU: every thread of a cluster of blocks is a fiber, clusters run one after the other.
//
// A fiber runs until it exits or waits: at a barrier of its warp (shuffles wait there too), at a numbered barrier of
// some of the block's threads, or for a phase of a barrier in shared memory. When no fiber can run, the complete
// barriers open. If none is complete, the asynchronous copies arrive. If there are none, the kernel has diverged, and
// the launch throws. This checks the arithmetic, every address (together with the address sanitizer), barriers that not
// all threads reach, and waits for copies: a copy's target is poisoned until the copy arrives, which is as late as the
// rules allow. A schedule with a seed runs threads in random order, lets warps sleep and, if the seed is odd, copies
// arrive at random. It does not check the order of memory operations, or speed. Static shared memory keeps its contents
// from block to block.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <new>
#include <random>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "machine.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

namespace cuda_on_cpu {

// A cluster of blocks, which run at the same time; most often of one.
class Block {
 public:
  // Runs body once for every thread of blocks `first` to `first + memory.size()` of a grid.
  void run(unsigned first, const std::vector<std::vector<unsigned char*>>& memory, unsigned block_threads,
           const std::function<void()>& body) {
    first_block_ = first;
    memory_ = &memory;
    block_threads_ = block_threads;
    const unsigned threads = block_threads * static_cast<unsigned>(memory.size());
    body_ = &body;
    error_.clear();
    barriers_.clear();
    bulk_.clear();
    ++runs_;
    random_.seed(schedule.seed);
    while (fibers_.size() < threads) fibers_.push_back(std::make_unique<Fiber>());
    threads_ = threads;
    for (unsigned i = 0; i < threads; ++i) start(*fibers_[i]);
    std::vector<unsigned> order(threads);
    for (unsigned i = 0; i < threads; ++i) order[i] = schedule.backwards ? threads - 1 - i : i;
    wakes_.assign(threads / kWarpSize + 1, 0);
    sweeps_ = 0;
    for (unsigned done = 0; done < threads;) {
      if (schedule.seed) {
        std::shuffle(order.begin(), order.end(), random_);
        ++sweeps_;
        for (unsigned& wake : wakes_)
          if (wake <= sweeps_ && random_() % 32 == 0) wake = sweeps_ + random_() % 64;
      }
      bool ran = false;
      done = 0;
      for (const unsigned thread : order) {
        Fiber& fiber = *fibers_[thread];
        if (fiber.wait == Wait::kPhase && fiber.barrier->phase > fiber.phase) fiber.wait = Wait::kNothing;
        if (fiber.wait == Wait::kCondition && fiber.condition()) fiber.wait = Wait::kNothing;
        if (!fiber.done && fiber.wait == Wait::kNothing && wakes_[thread / kWarpSize] <= sweeps_) {
          resume(thread);
          ran = true;
          if (!error_.empty()) throw std::runtime_error(error_);
          // Those who waited for the phase may run before other lanes of the warp that completed it.
          if (std::exchange(completed_, false) && schedule.seed && random_() % 2) break;
        }
        done += fiber.done;
        if (schedule.seed % 2 && random_() % 8 == 0) make_copy(fiber);
        if (schedule.seed % 3 == 1 && !bulk_.empty() && random_() % 1000 == 0) land(random_() % bulk_.size());
      }
      if (ran || done == threads || open_barriers()) continue;
      const bool slept = std::any_of(wakes_.begin(), wakes_.end(), [this](unsigned wake) { return wake > sweeps_; });
      wakes_.assign(wakes_.size(), 0);
      if (slept) continue;
      const auto busy =
          std::find_if(order.begin(), order.end(), [&](unsigned i) { return !fibers_[i]->copies.empty(); });
      if (busy != order.end()) {
        while (make_copy(*fibers_[*busy])) {
        }
      } else if (!bulk_.empty()) {
        land(random_() % bulk_.size());  // in no order
      } else {
        throw std::runtime_error(describe());
      }
      if (!error_.empty()) throw std::runtime_error(error_);
    }
    if (!bulk_.empty()) throw std::runtime_error("a block ends before copies to it have been made");
  }

  unsigned runs() const { return runs_; }       // so far
  unsigned thread() const { return current_; }  // of the cluster
  unsigned block_threads() const { return block_threads_; }
  unsigned rank() const { return current_ / block_threads_; }
  unsigned blocks() const { return threads_ / block_threads_; }
  unsigned char* shared_of(unsigned rank, bool asynchronous = false) const {
    return (*memory_)[rank][asynchronous ? 1 : 0];
  }
  const std::vector<BulkCopy>& bulk_copies() const { return bulk_; }

  // From another thread's memory as an asynchronous instruction of this thread changes it.
  void begin_bulk_copy(const BulkCopy& copy) {
    for (const bool view : {false, true}) std::memset(shared_of(copy.block, view) + copy.offset, 0xff, copy.bytes);
    bulk_.push_back(copy);
    if (schedule.seed % 3 == 2) land(bulk_.size() - 1);
    if (!error_.empty()) leave();
  }

  // Waits for `count` threads at barrier number `number`.
  void wait_numbered(unsigned number, unsigned count, const char* what) {
    Fiber& fiber = *fibers_[current_];
    fiber.wait = Wait::kNumbered;
    fiber.number = number;
    fiber.count = count;
    fiber.what = what;
    leave();
  }
  void wait_block() { wait_numbered(0, block_threads_, "__syncthreads"); }
  void wait_cluster() { wait_numbered(kClusterBarrier, threads_, "barrier.cluster"); }

  void wait_warp(unsigned mask, const char* what) {
    Fiber& fiber = *fibers_[current_];
    if (!(mask >> current_ % kWarpSize & 1u)) return fail(std::string(what) + ": a thread is not in its own mask");
    fiber.wait = Wait::kWarp;
    fiber.mask = mask;
    fiber.what = what;
    leave();
  }

  // Lets the other lanes read `mine` through shown(), from now until hide().
  void show(const void* mine, const char* what) {
    fibers_[current_]->shown = mine;
    wait_warp(0xffffffffu, what);
  }
  const void* shown(unsigned lane) const { return fibers_[current_ / kWarpSize * kWarpSize + lane]->shown; }
  void hide(const char* what) { wait_warp(0xffffffffu, what); }

  void begin_copy(void* to, const void* from, size_t bytes) {
    std::memset(to, 0xff, bytes);  // NaN
    fibers_[current_]->copies.push_back({to, from, bytes, nullptr});
  }
  void wait_copies() {
    while (make_copy(*fibers_[current_])) {
    }
  }

  void init_barrier(const void* address, unsigned arrivals) {
    barriers_[address] = {static_cast<int>(arrivals), static_cast<int>(arrivals), 0, 0};
  }
  // bytes: that the phase waits for as well.
  void arrive(const void* address, bool after_copies, int64_t bytes = 0) {
    Barrier* const barrier = find_barrier(address);
    if (!barrier) return;
    if (after_copies)
      fibers_[current_]->copies.push_back({nullptr, nullptr, 0, barrier});
    else
      settle(*barrier, 1, bytes);
    // With a seed, the threads that waited run before this one does anything else, and sometimes for long.
    if (schedule.seed && !after_copies && random_() % 64 == 0)
      wakes_[current_ / kWarpSize] = sweeps_ + 32 + random_() % 64;
    if (!error_.empty() || (schedule.seed && !after_copies)) leave();
  }
  // The barrier at this offset of another block's dynamic shared memory.
  void arrive_in(unsigned rank, size_t offset) {
    if (has_ended(rank)) return fail("an arrival at a barrier of a block that has ended");
    arrive(shared_of(rank) + offset, false);
  }
  void wait_until(const std::function<bool()>& condition, const char* what) {
    Fiber& fiber = *fibers_[current_];
    fiber.wait = Wait::kCondition;
    fiber.condition = condition;
    fiber.what = what;
    leave();
  }
  // Returns when the phase is complete that the parity means: the first or the one before it, then one after the other.
  void wait_phase(const void* address, unsigned parity) {
    const Barrier* const barrier = find_barrier(address);
    if (!barrier) return;
    Fiber& fiber = *fibers_[current_];
    const auto [found, first] = fiber.waited.try_emplace(barrier, parity ? -1 : 0);
    const int64_t phase = first ? found->second : ++found->second;
    if ((phase & 1) != static_cast<int64_t>(parity)) return fail("a wait for the wrong parity of a barrier's phase");
    fiber.wait = Wait::kPhase;
    fiber.barrier = barrier;
    fiber.phase = phase;
    fiber.what = "mbarrier.wait";
    leave();
    if (barrier->phase > phase + 1) return fail("a barrier has gone on by a whole phase while a thread waited");
  }

  // The value that `lane` of this thread's warp passes in.
  template <class T>
  T exchange(unsigned mask, T value, unsigned lane, const char* what) {
    static_assert(sizeof(T) <= sizeof(Fiber::slots[0]), "a shuffle moves at most 8 bytes");
    Fiber& fiber = *fibers_[current_];
    const unsigned slot = fiber.exchanges++ % 2;
    std::memcpy(fiber.slots[slot], &value, sizeof(T));
    wait_warp(mask, what);
    if (lane >= kWarpSize || !(mask >> lane & 1u)) {
      fail(std::string(what) + ": lane " + std::to_string(lane) + " is not in the mask");
      return value;
    }
    std::memcpy(&value, fibers_[current_ / kWarpSize * kWarpSize + lane]->slots[slot], sizeof(T));
    return value;
  }

  // Ends the launch with an error.
  void fail(const std::string& error) {
    if (error_.empty()) error_ = error;
    leave();
  }

 private:
  static void enter();  // a fiber's first function

  // A fiber that has finished a block goes on with the next one. A new one, and one that an error stopped, begins.
  void start(Fiber& fiber) {
    fiber.wait = Wait::kNothing;
    fiber.exchanges = 0;
    fiber.copies.clear();
    fiber.waited.clear();
    if (std::exchange(fiber.done, false)) return;
    fiber.fake_stack = nullptr;
    fiber.place.has_jump = false;
    ucontext_t& context = fiber.place.context;
    getcontext(&context);
    context.uc_stack.ss_sp = fiber.stack.get();
    context.uc_stack.ss_size = kStackBytes;
    context.uc_link = nullptr;
    makecontext(&context, &Block::enter, 0);
  }

  void resume(unsigned thread) {
    Fiber& fiber = *fibers_[thread];
    current_ = thread;
    const unsigned at = first_block_ + rank(), i = thread % block_threads_;
    blockIdx = {at % gridDim.x, at / gridDim.x % gridDim.y, at / gridDim.x / gridDim.y};
    threadIdx = {i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y)};
    dynamic_shared = shared_of(rank());
    asynchronous_shared = shared_of(rank(), true);
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(&fake_stack_, fiber.stack.get(), kStackBytes);
#endif
    switch_stacks(place_, fiber.place);
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(fake_stack_, nullptr, nullptr);
#endif
  }

  // From a fiber back to run().
  void leave() {
    Fiber& fiber = *fibers_[current_];
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(&fiber.fake_stack, stack_, stack_bytes_);
#endif
    switch_stacks(fiber.place, place_);
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(fiber.fake_stack, &stack_, &stack_bytes_);
#endif
  }

  Barrier* find_barrier(const void* address) {
    const auto found = barriers_.find(address);
    if (found != barriers_.end()) return &found->second;
    fail("a barrier that was not initialized");
    return nullptr;
  }

  void settle(Barrier& barrier, int arrivals, int64_t bytes) {
    barrier.missing -= arrivals;
    barrier.bytes += bytes;
    if (barrier.missing < 0) error_ = "more arrivals than a barrier expects";
    if (barrier.missing == 0 && barrier.bytes < 0) error_ = "more bytes have been copied than a barrier expects";
    if (barrier.missing != 0 || barrier.bytes != 0) return;
    barrier.missing = barrier.expected;
    ++barrier.phase;
    completed_ = true;
  }

  // Makes a bulk copy. Its block must still run, since its memory and barriers then are a later block's.
  void land(size_t which) {
    const BulkCopy copy = bulk_[which];
    bulk_.erase(bulk_.begin() + static_cast<std::ptrdiff_t>(which));
    const auto found = barriers_.find(copy.arrival);
    if (found == barriers_.end() || has_ended(copy.block)) {
      error_ = "a copy to a block that has ended, or to a barrier that was not initialized";
      return;
    }
    for (const bool view : {false, true}) std::memcpy(shared_of(copy.block, view) + copy.offset, copy.from, copy.bytes);
    settle(found->second, 0, -static_cast<int64_t>(copy.bytes));
  }

  // Makes a thread's oldest copy, or the arrival after it; false where it has none.
  bool make_copy(Fiber& fiber) {
    if (fiber.copies.empty()) return false;
    const Copy copy = fiber.copies.front();
    fiber.copies.pop_front();
    if (copy.arrival)
      settle(*copy.arrival, 1, 0);
    else
      std::memcpy(copy.to, copy.from, copy.bytes);
    return true;
  }

  // Whether `thread` waits with its whole warp: all lanes of its mask at the same function.
  bool is_warp_complete(unsigned thread) const {
    const unsigned first = thread / kWarpSize * kWarpSize;
    const Fiber& one = *fibers_[thread];
    for (unsigned lane = 0; lane < kWarpSize; ++lane) {
      if (!(one.mask >> lane & 1u)) continue;
      if (first + lane >= threads_) return false;
      const Fiber& other = *fibers_[first + lane];
      if (other.done || other.wait != Wait::kWarp || other.mask != one.mask || std::strcmp(other.what, one.what) != 0)
        return false;
    }
    return true;
  }

  bool open_barriers() {
    std::vector<unsigned> free;
    std::map<std::pair<unsigned, unsigned>, std::vector<unsigned>> at_number;  // by block and number
    for (unsigned i = 0; i < threads_; ++i) {
      const Fiber& fiber = *fibers_[i];
      if (fiber.done) continue;
      if (fiber.wait == Wait::kWarp && is_warp_complete(i)) free.push_back(i);
      if (fiber.wait == Wait::kNumbered)
        at_number[{fiber.number == kClusterBarrier ? 0 : i / block_threads_, fiber.number}].push_back(i);
    }
    for (const auto& [place, waiting] : at_number)
      if (!waiting.empty() && waiting.size() == fibers_[waiting.front()]->count)
        free.insert(free.end(), waiting.begin(), waiting.end());
    for (const unsigned i : free) fibers_[i]->wait = Wait::kNothing;
    return !free.empty();
  }

  bool has_ended(unsigned rank) const {
    for (unsigned i = rank * block_threads_; i < (rank + 1) * block_threads_; ++i)
      if (!fibers_[i]->done) return false;
    return true;
  }

  // Where the block is stuck, in one sentence.
  std::string describe() const {
    unsigned exited = 0;
    std::string where;
    for (unsigned i = 0; i < threads_; ++i) {
      exited += fibers_[i]->done;
      if (!fibers_[i]->done && where.find(fibers_[i]->what) == std::string::npos)
        where += std::string(where.empty() ? "" : " and ") + fibers_[i]->what;
    }
    return "the kernel diverged: threads wait at " + where + ", " + std::to_string(exited) + " of " +
           std::to_string(threads_) + " have exited";
  }

  const std::function<void()>* body_ = nullptr;
  const std::vector<std::vector<unsigned char*>>* memory_ =
      nullptr;  // of each block: dynamic shared, asynchronous view
  std::vector<BulkCopy> bulk_;
  std::vector<unsigned> wakes_;  // the sweep that a sleeping warp wakes in
  bool completed_ = false;       // a phase of a barrier, by the thread that runs
  unsigned sweeps_ = 0, first_block_ = 0, block_threads_ = 1, runs_ = 0;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::unordered_map<const void*, Barrier> barriers_;
  std::mt19937 random_;
  unsigned threads_ = 0, current_ = 0;
  std::string error_;
  Place place_;  // of run()
  void* fake_stack_ = nullptr;
  const void* stack_ = nullptr;  // of run()'s caller
  size_t stack_bytes_ = 0;
};

inline Block block;

inline void Block::enter() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &block.stack_, &block.stack_bytes_);
#endif
  for (;; block.leave()) {
    (*block.body_)();
    Fiber& fiber = *block.fibers_[block.current_];
    if (!fiber.copies.empty()) block.error_ = "a thread ends before its copies have been made";
    fiber.done = true;
  }
}

inline void run_grid(dim3 grid, dim3 threads, unsigned cluster, size_t dynamic_bytes,
                     const std::function<void()>& body) {
  struct Free {
    void operator()(unsigned char* memory) const { operator delete[](memory, std::align_val_t{1024}); }
  };
  std::vector<std::unique_ptr<unsigned char, Free>> owned;  // to the byte, for the sanitizer
  std::vector<std::vector<unsigned char*>> memory(cluster);
  for (unsigned i = 0; i < 2 * cluster; ++i) {
    owned.emplace_back(static_cast<unsigned char*>(operator new[](dynamic_bytes, std::align_val_t{1024})));
    memory[i / 2].push_back(owned.back().get());
  }
  if (schedule.most_blocks && grid.x > schedule.most_blocks)
    grid.x = std::max(schedule.most_blocks / cluster * cluster, cluster);
  gridDim = grid;
  blockDim = threads;
  const uint64_t clusters = uint64_t{grid.x} * grid.y * grid.z / cluster;
  for (uint64_t i = 0; i < clusters; ++i) {
    const uint64_t at = schedule.backwards ? clusters - 1 - i : i;
    for (const auto& one : owned) std::memset(one.get(), 0xff, dynamic_bytes);  // NaN: tests see values not written
    block.run(static_cast<unsigned>(at) * cluster, memory, threads.x * threads.y * threads.z, body);
  }
}

}  // namespace cuda_on_cpu
