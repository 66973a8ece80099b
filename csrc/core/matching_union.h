// How candidates for a query are compared: the target that most sets matched with it, then the lower target. One
// number, so that a maximum decides. 0 is less than every candidate and no target's.
#pragma once

#include <cstdint>

#include "box.h"

namespace detr {

// count: how many sets have the pair, at least 1.
DETR_HD int64_t candidate_of(int32_t count, int32_t target) { return int64_t(count) << 32 | (0xffffffff - target); }

DETR_HD bool is_candidate_of(int64_t candidate, int32_t target) {
  return uint32_t(candidate) == 0xffffffff - uint32_t(target);
}

}  // namespace detr
