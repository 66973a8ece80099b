// Arrays of many types in one block of memory.
#pragma once

#include <cstddef>
#include <cstdint>

#include "lanes.h"

namespace detr::cpu {
namespace {

// Hands out arrays from one block of memory; with a null block it only measures.
class Arena {
 public:
  explicit Arena(void* block) : base_(reinterpret_cast<uintptr_t>(block)) {}

  template <typename E>
  E* take(int64_t count) {
    E* array = reinterpret_cast<E*>(base_ + used_);
    used_ += round_up(count * sizeof(E), 64);
    return array;
  }
  size_t used() const { return used_; }

 private:
  uintptr_t base_;
  size_t used_ = 0;
};

}  // namespace
}  // namespace detr::cpu
