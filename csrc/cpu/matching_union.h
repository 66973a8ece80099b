// Union of the matchings of several prediction sets, one image after the other: O(sets * targets + queries).
#pragma once

#include <algorithm>
#include <cstdint>

#include "../core/matching_union.h"
#include "../kernels.h"
#include "arena.h"

namespace detr::cpu {
namespace {

// Best candidate of each query among the targets [begin, end).
void find_candidates(const UnionArguments& a, int32_t begin, int32_t end,
                     int32_t* sets_of_query,  // [Q] zeros, before and after
                     int64_t* candidate) {    // [Q] zeros
  for (int32_t t = begin; t < end; ++t) {
    const int32_t* column = a.query_of_target + t;
    for (int64_t s = 0; s < a.batch.layers; ++s) {
      const int32_t query = column[s * a.batch.targets];
      if (query >= 0) ++sets_of_query[query];
    }
    for (int64_t s = 0; s < a.batch.layers; ++s) {
      const int32_t query = column[s * a.batch.targets];
      if (query < 0 || sets_of_query[query] == 0) continue;
      candidate[query] = std::max(candidate[query], candidate_of(sets_of_query[query], t));
      sets_of_query[query] = 0;
    }
  }
}

// Images [begin, end). Queries must be in [-1, Q).
void unite(const UnionArguments& a, int64_t begin, int64_t end) {
  const Batch& batch = a.batch;
  const auto layout = [&](void* block, int32_t** sets_of_query, int64_t** candidate) {
    Arena arena(block);
    *sets_of_query = arena.take<int32_t>(batch.queries);
    *candidate = arena.take<int64_t>(batch.queries);
    return arena.used();
  };
  int32_t* sets_of_query;
  int64_t* candidate;
  layout(scratch(Scratch::kSolver, layout(nullptr, &sets_of_query, &candidate)), &sets_of_query, &candidate);
  std::fill_n(sets_of_query, batch.queries, 0);
  for (int64_t image = begin; image < end; ++image) {
    const int32_t first = batch.offsets[image], last = batch.offsets[image + 1];
    std::fill_n(candidate, batch.queries, 0);
    find_candidates(a, first, last, sets_of_query, candidate);
    for (int64_t s = 0; s < batch.layers; ++s) {
      for (int64_t t = first; t < last; ++t) {
        const int32_t query = a.query_of_target[s * batch.targets + t];
        const bool kept = query >= 0 && is_candidate_of(candidate[query], int32_t(t));
        a.united[s * batch.targets + t] = kept ? query : -1;
        if (kept) candidate[query] = 0;  // later sets do not repeat the pair
      }
    }
  }
}

}  // namespace
}  // namespace detr::cpu
