// The emulated GPU: its properties, the schedule of a launch, a thread, and what is under way asynchronously.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <unordered_map>
#include <vector>

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_on_cpu {

constexpr unsigned kWarpSize = 32;
constexpr size_t kStackBytes = 128 << 10;

// Variations of a launch that must not change its result. Bulk copies arrive, and products of warpgroups read, as late
// as the rules allow, at random, or at once: seed % 3 of 0, 1 or 2.
struct Schedule {
  unsigned most_blocks =
      0;                   // 0: as many as the launch asks for; a kernel that strides by the grid needs no more than 1
  bool backwards = false;  // blocks and threads from last to first
  unsigned seed = 0;       // 0: the same order every time
};
inline Schedule schedule;

// The properties of the emulated GPU; small, so that each block has several tiles.
struct Device {
  int processors = 3, block_shared_bytes = 227 << 10, processor_shared_bytes = 228 << 10, major = 9, minor = 0;
};
inline std::vector<Device> devices(1);  // every one that was set: the kernels ask each device once
inline int current_device = 0;

inline void set_device(const Device& wanted) {
  const auto same = [&](const Device& one) { return std::memcmp(&one, &wanted, sizeof(Device)) == 0; };
  const auto found = std::find_if(devices.begin(), devices.end(), same);
  current_device = static_cast<int>(found - devices.begin());
  if (found == devices.end()) devices.push_back(wanted);
}

// The dynamic shared memory of the running thread's block, and its memory as asynchronous instructions see it.
inline unsigned char *dynamic_shared = nullptr, *asynchronous_shared = nullptr;

// A barrier in shared memory.
struct Barrier {
  int expected, missing;  // arrivals of a phase
  int64_t bytes, phase;   // that it waits for; the current one
};

// An asynchronous copy, or the arrival that follows it.
struct Copy {
  void* to;
  const void* from;
  size_t bytes;
  Barrier* arrival;
};

// A bulk copy under way into dynamic shared memory.
struct BulkCopy {
  unsigned block;  // of the cluster
  size_t offset, bytes;
  const void* from;
  const void* arrival;  // the address of its barrier
};

// Where a stack goes on. swapcontext makes a system call each time, so it only begins a stack, except under the address
// sanitizer, which follows it.
struct Place {
  ucontext_t context;
  void* jump[5];
  bool has_jump = false;
};

inline void switch_stacks(Place& from, Place& to) {
#ifdef __SANITIZE_ADDRESS__
  swapcontext(&from.context, &to.context);
#else
  from.has_jump = true;
  if (__builtin_setjmp(from.jump)) return;
  if (to.has_jump) __builtin_longjmp(to.jump, 1);
  setcontext(&to.context);
#endif
}

enum class Wait { kNothing, kWarp, kNumbered, kPhase, kCondition };

struct Fiber {
  Place place;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  Wait wait;
  bool done = false;
  unsigned mask;                    // of the warp's barrier it waits at
  unsigned number, count;           // of the numbered barrier it waits at, and of the threads that meet there
  const Barrier* barrier;           // whose phase it waits for,
  int64_t phase;                    // and the phase
  std::function<bool()> condition;  // that it waits for
  std::unordered_map<const Barrier*, int64_t> waited;  // the latest phase that it waited for
  const char* what;                                    // the name of the function that waits
  unsigned exchanges;                                  // counted, so that no slot is written while other lanes read it
  unsigned char slots[2][8];
  const void* shown;        // to the warp, see show()
  std::deque<Copy> copies;  // under way
  void* fake_stack;         // the address sanitizer's
};

// A barrier's number that all threads of the cluster share, and the first of those that each warpgroup has.
constexpr unsigned kClusterBarrier = 16, kWarpgroupBarrier = 17;

}  // namespace cuda_on_cpu
