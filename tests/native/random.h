// Random numbers of the fuzz programs, the same at every run.
#pragma once

#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "../../csrc/kernels.h"

inline std::mt19937 generator(1);

inline int64_t integer(int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(generator);
}

inline float uniform(float low, float high) { return std::uniform_real_distribution<float>(low, high)(generator); }

inline std::vector<float> numbers(int64_t count, float low, float high) {
  std::vector<float> list(count);
  for (float& x : list) x = uniform(low, high);
  return list;
}

// Costs of every kind: spread, tied, with NaN, mostly infinite.
template <typename T>
std::vector<T> costs(int64_t count) {
  const int64_t kind = integer(0, 3);
  std::vector<T> list(count);
  for (T& x : list) {
    x = uniform(0, 1);
    if (kind == 1) x = std::round(x * 3);
    if (kind == 2 && uniform(0, 1) < 0.4f) x = std::nan("");
    if (kind == 3 && uniform(0, 1) < 0.9f) x = HUGE_VAL;
  }
  return list;
}

// Every target has at most one of these queries, allowed for it, and no query two targets. cost [targets, stride].
template <typename T>
bool is_one_to_one(const T* cost, int64_t stride, int64_t targets, int64_t first_query, int64_t queries,
                   const int32_t* query_of_target) {
  std::vector<int32_t> uses(queries);
  for (int64_t t = 0; t < targets; ++t) {
    const int32_t query = query_of_target[t];
    if (query == -1) continue;
    if (query < first_query || query >= first_query + queries) return false;
    if (uses[query - first_query]++ > 0 || !std::isfinite(cost[t * stride + query])) return false;
  }
  return true;
}

// The same of every group of every image and layer. query_of_target as AssignmentArguments'.
template <typename T>
bool are_one_to_one(const detr::Batch& batch, int64_t groups, const T* cost, const int32_t* query_of_target) {
  const int64_t width = batch.queries / groups;
  for (int64_t layer = 0; layer < batch.layers; ++layer) {
    for (int64_t image = 0; image < batch.images; ++image) {
      const int64_t first = layer * batch.targets + batch.offsets[image];
      const int64_t count = batch.offsets[image + 1] - batch.offsets[image];
      for (int64_t group = 0; group < groups; ++group) {
        const int32_t* own = query_of_target + first * groups + group * count;
        if (!is_one_to_one(cost + first * batch.queries, batch.queries, count, group * width, width, own)) return false;
      }
    }
  }
  return true;
}
