// The functions of csrc/cuda/wgmma.cuh for kernels that run on the CPU.
//
// From its issue until its group is waited for, a product's accumulators hold NaN. It reads its operands at the wait,
// or with schedule.seed % 3 == 2 when its group is committed: B through the descriptor's own address arithmetic, from
// shared memory as asynchronous instructions see it, which ordinary stores reach only by fence_async_proxy(). Mistakes
// that the emulator names: accumulators or operands touched under way, a product of memory that a copy still fills, a
// copy to memory that a product still reads, a missing fence or commit, threads of a warpgroup that issue different
// products. More registers than the launch gave a block are a deadlock.
#pragma once

#include <array>

#include "ptx_on_cpu.h"

namespace liif_fast {

constexpr uint32_t kSharedBase = 0x400;

}  // namespace liif_fast

namespace cuda_on_cpu {

constexpr unsigned kWarpgroupSize = 128;

struct Product {
  float* d;
  const uint32_t* a;
  std::array<uint32_t, 4> operands;  // as they were at the issue
  uint64_t b;                        // descriptor
  bool adds;
  float (*to_float)(uint16_t);
  uint32_t columns;  // of B, 128 bytes each

  size_t sums() const { return columns / 2; }     // of a thread
  size_t bytes() const { return columns * 128; }  // from the first column to the last
};

// What a thread has under way.
struct Issued {
  std::vector<std::vector<Product>> groups;                      // the last one is not committed
  std::map<float*, std::pair<std::array<float, 64>, int>> sums;  // accumulators under way, and their products
  size_t executed;                                               // groups, from the first
  unsigned waits;
  bool fenced;
};

class Warpgroups {
 public:
  Issued& mine() {
    begin();
    return of(block.thread());
  }

  void issue(Product product) {
    Issued& issued = mine();
    if (!issued.fenced) return block.fail("a product without wgmma.fence since the last wait");
    const size_t offset = first_byte(product);
    for (const BulkCopy& copy : block.bulk_copies())
      if (copy.block == block.rank() && offset < copy.offset + copy.bytes && copy.offset < offset + product.bytes())
        return block.fail("a product reads shared memory that a copy still fills");
    auto& [values, pending] = issued.sums[product.d];
    if (pending++ == 0) {
      std::copy_n(product.d, product.sums(), values.data());
      std::fill_n(reinterpret_cast<uint32_t*>(product.d), product.sums(), kPoison);
    }
    std::memcpy(product.operands.data(), product.a, sizeof(product.operands));
    issued.groups.back().push_back(product);
  }

  void commit() {
    Issued& issued = mine();
    issued.groups.emplace_back();
    if (schedule.seed % 3 != 2) return;
    const size_t first = first_thread(), group = issued.groups.size() - 2;
    for (size_t i = first; i < first + kWarpgroupSize; ++i)
      if (of(i).waits != issued.waits || of(i).groups.size() != issued.groups.size()) return;
    execute(first, group);
  }

  void wait(size_t pending) {
    Issued& issued = mine();
    if (!issued.groups.back().empty()) return block.fail("a wait with products that are not committed");
    issued.fenced = false;
    const unsigned waits = ++issued.waits;
    const size_t first = first_thread();
    const auto number =
        static_cast<unsigned>(kWarpgroupBarrier + block.thread() % block.block_threads() / kWarpgroupSize);
    block.wait_numbered(number, kWarpgroupSize, "wgmma.wait_group");
    if (mine().groups.size() <= pending + 1) return;
    // The first thread to go on completes the groups of all.
    for (size_t i = first; i < first + kWarpgroupSize; ++i)
      if (of(i).waits != waits || of(i).groups.size() != mine().groups.size())
        return block.fail("the threads of a warpgroup issue different products");
    while (mine().groups.size() > pending + 1) {
      if (mine().executed == 0) execute(first, 0);
      for (size_t i = first; i < first + kWarpgroupSize; ++i) retire(of(i));
    }
  }

  // Whether a product under way in a block reads any of these bytes of its shared memory.
  bool reads(unsigned rank, size_t offset, size_t bytes) {
    begin();
    for (size_t i = rank * block.block_threads(); i < (rank + 1) * block.block_threads(); ++i)
      for (size_t group = of(i).executed; group < of(i).groups.size(); ++group)
        for (const Product& product : of(i).groups[group])
          if (first_byte(product) < offset + bytes && offset < first_byte(product) + product.bytes()) return true;
    return false;
  }

  int& free_registers() {
    begin();
    return registers_[block.rank()];
  }

 private:
  // Forgets the cluster that ran before.
  void begin() {
    if (run_ == block.runs()) return;
    run_ = block.runs();
    Issued nothing{};
    nothing.groups.resize(1);
    issued_.assign(block.blocks() * block.block_threads(), nothing);
    registers_.assign(block.blocks(), 0);
  }

  static constexpr uint32_t kPoison = 0x7fc0dead;

  Issued& of(size_t thread) { return issued_[thread]; }
  static size_t first_thread() { return block.thread() / kWarpgroupSize * kWarpgroupSize; }
  static size_t first_byte(const Product& product) {
    return ((product.b & 0x3fff) << 4 & ~uint64_t{1023}) - liif_fast::kSharedBase;
  }

  // Group `group` of every thread of a warpgroup: products of 64 rows and 16 inputs, in order.
  void execute(size_t first, size_t group) {
    for (size_t index = 0; index < of(first).groups[group].size(); ++index) {
      const Product& one = of(first).groups[group][index];
      static float b[16][128], a[64][16], sums[64][128];
      const uint32_t start = static_cast<uint32_t>(one.b & 0x3fff) << 4;
      const uint32_t stride = static_cast<uint32_t>(one.b >> 32 & 0x3fff) << 4;
      if (one.b >> 62 != 1) return block.fail("a descriptor without the 128-byte swizzle");
      for (uint32_t n = 0; n < one.columns; ++n)
        for (uint32_t k = 0; k < 16; ++k) {
          uint32_t address = start + n / 8 * stride + n % 8 * 128 + k * 2;
          address ^= (address >> 7 & 7) << 4;
          uint16_t bits;
          std::memcpy(&bits, asynchronous_shared + (address - liif_fast::kSharedBase), 2);
          b[k][n] = one.to_float(bits);
        }
      for (size_t i = 0; i < kWarpgroupSize; ++i) {
        if (of(first + i).groups[group].size() <= index) return block.fail(kDifferent);
        const Product& mine = of(first + i).groups[group][index];
        if (mine.b != one.b || mine.adds != one.adds || mine.columns != one.columns) return block.fail(kDifferent);
        if (std::memcmp(mine.a, mine.operands.data(), sizeof(mine.operands)) != 0)
          return block.fail("operands were changed while a product was under way");
        const size_t row = i / 32 * 16 + i % 32 / 4, quad = i % 4;
        for (size_t word = 0; word < 4; ++word)
          for (size_t e = 0; e < 2; ++e)
            a[row + word % 2 * 8][word / 2 * 8 + quad * 2 + e] =
                one.to_float(static_cast<uint16_t>(mine.operands[word] >> 16 * e));
        const auto& values = of(first + i).sums.at(mine.d).first;
        for (size_t j = 0; j < one.sums(); ++j)
          sums[row + j / 2 % 2 * 8][j / 4 * 8 + quad * 2 + j % 2] = mine.adds ? values[j] : 0.0f;
      }
      for (size_t row = 0; row < 64; ++row)
        for (size_t k = 0; k < 16; ++k)
          for (size_t n = 0; n < one.columns; ++n) sums[row][n] += a[row][k] * b[k][n];
      for (size_t i = 0; i < kWarpgroupSize; ++i) {
        auto& values = of(first + i).sums.at(of(first + i).groups[group][index].d).first;
        const size_t row = i / 32 * 16 + i % 32 / 4, quad = i % 4;
        for (size_t j = 0; j < one.sums(); ++j) values[j] = sums[row + j / 2 % 2 * 8][j / 4 * 8 + quad * 2 + j % 2];
      }
    }
    for (size_t i = first; i < first + kWarpgroupSize; ++i) of(i).executed = group + 1;
  }

  // Gives a thread the sums of its first group.
  void retire(Issued& issued) {
    for (const Product& product : issued.groups[0]) {
      auto& [values, pending] = issued.sums.at(product.d);
      if (--pending > 0) continue;
      for (size_t i = 0; i < product.sums(); ++i)
        if (std::memcmp(&product.d[i], &kPoison, 4) != 0)
          return block.fail("accumulators were touched while a product was under way");
      std::copy_n(values.data(), product.sums(), product.d);
      issued.sums.erase(product.d);
    }
    issued.groups.erase(issued.groups.begin());
    --issued.executed;
  }

  static constexpr const char* kDifferent = "the threads of a warpgroup issue different products";
  std::vector<Issued> issued_;  // by thread of the cluster
  std::vector<int> registers_;  // by block
  unsigned run_ = 0;
};
inline Warpgroups warpgroups;

}  // namespace cuda_on_cpu

namespace liif_fast {

inline int reread_thread() { return static_cast<int>(threadIdx.x); }
inline int reread_grid() { return static_cast<int>(gridDim.x); }
inline uint32_t cluster_rank() { return cuda_on_cpu::block.rank(); }
inline uint32_t cluster_size() { return cuda_on_cpu::block.blocks(); }
inline void sync_cluster() {
  if (cuda_on_cpu::warpgroups.mine().groups.size() > 1) cuda_on_cpu::block.fail("products under way at the end");
  cuda_on_cpu::block.wait_cluster();
}

inline uint32_t shared_address(const void* shared) {
  return kSharedBase + static_cast<uint32_t>(static_cast<const unsigned char*>(shared) - cuda_on_cpu::dynamic_shared);
}
inline void fence_barrier_init() {}
inline uint32_t remote_address(const void* shared, uint32_t rank) { return shared_address(shared) | rank << 24; }
template <int kOffset>
void arrive_remote(uint32_t remote) {
  cuda_on_cpu::block.arrive_in(remote >> 24, (remote & 0xffffff) - kSharedBase + kOffset);
}
inline void arrive_and_expect(uint64_t* barrier, uint32_t bytes) { cuda_on_cpu::block.arrive(barrier, false, bytes); }
inline void copy_bulk(void* shared, const void* global, uint32_t bytes, uint64_t* barrier, uint32_t ranks) {
  using namespace cuda_on_cpu;
  const size_t offset = shared_address(shared) - kSharedBase, arrival = shared_address(barrier) - kSharedBase;
  if (offset % 16 || bytes % 16 || reinterpret_cast<uintptr_t>(global) % 16)
    return block.fail("a bulk copy of other than 16-byte pieces");
  for (unsigned rank = 0; rank < 32; ++rank) {
    if (!(ranks >> rank & 1)) continue;
    if (rank >= block.blocks()) return block.fail("a bulk copy to a block outside the cluster");
    if (warpgroups.reads(rank, offset, bytes)) return block.fail("a copy to memory that a product still reads");
    block.begin_bulk_copy({rank, offset, bytes, global, block.shared_of(rank) + arrival});
  }
}
// Lets asynchronous instructions see this block's ordinary stores.
inline void fence_async_proxy(size_t bytes) {
  std::memcpy(cuda_on_cpu::asynchronous_shared, cuda_on_cpu::dynamic_shared, bytes);
}

// A block has what its launch gives: a processor's registers, shared evenly and rounded down to eights.
inline int launch_registers() { return 65536 / static_cast<int>(cuda_on_cpu::block.block_threads()) / 8 * 8; }
template <int kRegisters>
void give_registers() {
  cuda_on_cpu::warpgroups.free_registers() += launch_registers() - kRegisters;
}
template <int kRegisters>
void take_registers() {
  const int more = kRegisters - launch_registers();
  cuda_on_cpu::block.wait_until([=] { return cuda_on_cpu::warpgroups.free_registers() >= more; }, "setmaxnreg.inc");
  cuda_on_cpu::warpgroups.free_registers() -= more;
}

inline void fence_operands() { cuda_on_cpu::warpgroups.mine().fenced = true; }
inline void commit_products() { cuda_on_cpu::warpgroups.commit(); }
template <int kPending>
void wait_products() {
  cuda_on_cpu::warpgroups.wait(kPending);
}
template <class Element>
float operand_float(uint16_t bits) {
  Element value;
  std::memcpy(&value, &bits, 2);
  return static_cast<float>(value);
}
template <uint32_t kOffset, bool kAdds, size_t kSums, class Element>
void multiply_add(float (&d)[kSums], const uint32_t (&a)[4], Element) {
  const uint64_t b = uint64_t{0x40000040} << 32 | ((kSharedBase + kOffset) & 0x3ffff) >> 4 | 1u << 16;
  cuda_on_cpu::warpgroups.issue({d, a, {}, b, kAdds, &operand_float<Element>, 2 * kSums});
}

template <class Element>
uint32_t above_zero(uint32_t word, Element) {
  const float2 two = unpack(word, Element{});
  return (two.x <= 0.0f ? 0u : 0xffffu) | (two.y <= 0.0f ? 0u : 0xffff0000u);
}
inline uint32_t spread_signs(uint32_t low, uint32_t high, uint32_t selector) {
  uint32_t word = 0;
  for (int byte = 0; byte < 4; ++byte) {
    const uint32_t digit = selector >> 4 * byte & 15u, found = (digit & 4 ? high : low) >> 8 * (digit & 3) & 255u;
    word |= (digit & 8 ? (found & 128u ? 255u : 0u) : found) << 8 * byte;
  }
  return word;
}
inline float reciprocal(float value) { return 1.0f / value; }
template <class Element>
uint32_t pack_in_order(float low, float high, Element) {
  return pack(low, high, Element{});
}
template <class Element>
uint32_t pack_relu(float low, float high, Element) {
  return pack(relu(low), relu(high), Element{});
}

}  // namespace liif_fast
