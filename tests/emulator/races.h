// Races of one launch, found by what orders two accesses rather than by their luck: two threads touch the same two
// bytes, one of them writes, not both atomically, and no barrier lies between. __syncthreads orders a block,
// __syncwarp a warp. Shuffles, votes and reductions order nothing, as CUDA has it. A block may read what a thread of
// another wrote before its __threadfence, once it has itself made an atomic access, as the last block of a grid does.
#pragma once

#include <cstdint>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

namespace emulator {

struct Access {
  int64_t block;
  int thread;
  uint32_t block_epoch, warp_epoch, fences;
  bool is_atomic, is_shared;  // shared memory is another one in every block
};

class Races {
 public:
  void clear() {
    cells_.clear();
    fences_.clear();
    synchronized_.clear();
    description_.clear();
    accesses = 0;
  }

  void add(uintptr_t address, size_t size, bool is_write, const Access& access) {
    ++accesses;
    for (uintptr_t pair = address / 2; pair <= (address + size - 1) / 2; ++pair) add_pair(pair, is_write, access);
  }

  // A block has made an atomic access.
  void synchronize(int64_t block) { synchronized_.insert(block); }

  void fence(int64_t block, int thread) { ++fences_[block << 12 | thread]; }
  uint32_t fences(int64_t block, int thread) const {
    const auto found = fences_.find(block << 12 | thread);
    return found == fences_.end() ? 0 : found->second;
  }

  const std::string& description() const { return description_; }
  int64_t accesses = 0;

 private:
  // Reads by one warp between two barriers of its block: which lanes have read since the warp's last barrier.
  struct WarpReads {
    int warp;
    uint32_t warp_epoch, lanes;
  };

  // Two bytes of memory: half types are the smallest that threads write side by side.
  struct Cell {
    bool written = false;
    Access write{};
    int64_t block = -1;        // the reads are of this block and epoch; its earlier ones come before all that follows
    int64_t other_block = -1;  // another one that has read since the write
    uint32_t block_epoch = 0;
    std::vector<WarpReads> reads;
  };

  bool ordered(const Access& before, const Access& now, bool both_write) const {
    if (before.block != now.block && now.is_shared) return true;
    if (before.block != now.block)
      return !both_write && fences(before.block, before.thread) > before.fences && synchronized_.count(now.block) > 0;
    if (before.thread == now.thread) return true;
    if (before.block_epoch < now.block_epoch) return true;
    return before.thread / 32 == now.thread / 32 && before.warp_epoch < now.warp_epoch;
  }

  void add_pair(uintptr_t pair, bool is_write, const Access& now) {
    Cell& cell = cells_[pair];
    if (cell.written && !(cell.write.is_atomic && now.is_atomic) && !ordered(cell.write, now, is_write))
      report(cell.write.block, cell.write.thread, "writes", now, is_write);
    if (cell.block != now.block || cell.block_epoch != now.block_epoch) {
      if (cell.block != now.block && !cell.reads.empty() && !now.is_shared) cell.other_block = cell.block;
      cell.reads.clear();
      cell.block = now.block;
      cell.block_epoch = now.block_epoch;
    }
    if (is_write) {
      check_reads(cell, now);
      cell.reads.clear();
      cell.other_block = -1;
      cell.written = true;
      cell.write = now;
    } else {
      add_read(cell, now);
    }
  }

  static void add_read(Cell& cell, const Access& now) {
    const int warp = now.thread / 32;
    const uint32_t lane = 1u << now.thread % 32;
    for (WarpReads& reads : cell.reads) {
      if (reads.warp != warp) continue;
      reads.lanes = reads.warp_epoch == now.warp_epoch ? reads.lanes | lane : lane;
      reads.warp_epoch = now.warp_epoch;
      return;
    }
    cell.reads.push_back({warp, now.warp_epoch, lane});
  }

  void check_reads(const Cell& cell, const Access& now) {
    if (cell.other_block >= 0 && cell.other_block != now.block) report(cell.other_block, 0, "reads", now, true);
    for (const WarpReads& reads : cell.reads) {
      const bool same_warp = reads.warp == now.thread / 32;
      uint32_t others = reads.lanes;
      if (same_warp) others = reads.warp_epoch == now.warp_epoch ? others & ~(1u << now.thread % 32) : 0;
      if (others != 0) report(cell.block, reads.warp * 32 + __builtin_ctz(others), "reads", now, true);
    }
  }

  void report(int64_t block, int thread, const char* verb, const Access& now, bool is_write) {
    if (!description_.empty()) return;
    description_ = "race: thread " + std::to_string(thread) + " of block " + std::to_string(block) + " " + verb +
                   " and thread " + std::to_string(now.thread) + " of block " + std::to_string(now.block) +
                   (is_write ? " writes" : " reads") + " the same memory with no barrier between";
  }

  std::unordered_map<uintptr_t, Cell> cells_;
  std::unordered_map<int64_t, uint32_t> fences_;
  std::unordered_set<int64_t> synchronized_;
  std::string description_;
};

}  // namespace emulator
