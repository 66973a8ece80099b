// Costs of one assignment problem as its search reads them: rows <= columns, forbidden pairs as +infinity.
#pragma once

#include "../kernels.h"
#include "group.h"

namespace detr::cuda {

constexpr int32_t kFree = INT32_MAX;  // owner of a column that has none

template <typename T>
__device__ __forceinline__ T allowed_or_infinite(T cost) {
  return fabs(cost) < kCostLimit<T> ? cost : kInfinity<T>;
}

// A problem with rows <= columns. Forbidden costs read as +infinity. Columns are neighbours in memory, or, kStrided,
// column_stride apart.
template <typename T, bool kStrided>
struct CostView {
  const T* cost;
  int rows, columns, row_stride, column_stride;

  __device__ __forceinline__ T stored(int row, int column) const {
    return cost[int64_t(row) * row_stride + int64_t(column) * (kStrided ? column_stride : 1)];
  }
  __device__ __forceinline__ T at(int row, int column) const { return allowed_or_infinite(stored(row, column)); }
};

template <typename T>
struct Nearest {
  T cost;
  int column;  // -1 = none
};

// A row's cheapest column, of all or of the free ones; the lowest of equal ones. Four loads are under way at a time:
// the barrier keeps the compiler from waiting for one before it starts the next.
template <bool kOnlyFree, typename T, bool kStrided, typename Group>
__device__ __forceinline__ Nearest<T> nearest_column(Group& group, const CostView<T, kStrided>& view, int row,
                                                     const int32_t* owner) {
  constexpr int kLoads = 4;
  Nearest<T> own = {kInfinity<T>, -1};
#pragma unroll 1
  for (int start = 0; start < view.columns; start += kLoads * Group::kSize) {
    T cost[kLoads];
    int32_t taken_by[kLoads];
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
      const int column = start + k * Group::kSize + group.rank;
      cost[k] = column < view.columns ? view.stored(row, column) : kInfinity<T>;
      taken_by[k] = kOnlyFree && column < view.columns ? owner[column] : kFree;
    }
    group.sync();
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
      const bool better = (cost[k] < own.cost) & (fabs(cost[k]) < kCostLimit<T>)&(taken_by[k] == kFree);
      own.cost = better ? cost[k] : own.cost;
      own.column = better ? start + k * Group::kSize + group.rank : own.column;
    }
  }
  const Bits<T> least = group.min(ordered(own.cost));
  const T cost = from_ordered<T>(least);
  const uint32_t column = group.min(own.cost == cost ? uint32_t(own.column) : ~0u);
  return {cost, int(column)};
}

// Costs of the rows first, first + kStep, ... at a column, into gathered [rows, leading] at its slot. Four loads are
// under way at a time.
template <int kStep, bool kStrided>
__device__ __forceinline__ void gather_column(const CostView<float, kStrided>& view, int column, int slot, int first,
                                              float* gathered, int leading) {
  constexpr int kLoads = 4;
  for (int start = first; start < view.rows; start += kLoads * kStep) {
    float cost[kLoads];
#pragma unroll
    for (int k = 0; k < kLoads; ++k) cost[k] = view.stored(smaller(start + k * kStep, view.rows - 1), column);
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
      const int row = start + k * kStep;
      if (row < view.rows) gathered[row * leading + slot] = allowed_or_infinite(cost[k]);
    }
  }
}

}  // namespace detr::cuda
