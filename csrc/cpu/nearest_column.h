// The cheapest column of a row, and whether all its costs are ordinary numbers, in one pass.
#pragma once

#include <algorithm>

#include "../kernels.h"
#include "lanes.h"

namespace detr::cpu {
namespace {

template <typename T>
struct Nearest {
  T cost;
  int64_t column;
};

// Bits of the magnitude: ordered like the magnitude, with infinity and NaN above all numbers.
template <typename T>
DETR_HD Index<T> magnitude_bits(Value<T> x) {
  Index<T> bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits & std::numeric_limits<Int<T>>::max();
}

// Running minimum of a row with its position, and the largest magnitude met.
template <typename T>
struct RowScan {
  Value<T> best = all_lanes(kInfinity<T>);
  Index<T> where{}, largest{};

  DETR_HD void visit(Value<T> x, Index<T> numbers) {
    where = x < best ? numbers : where;
    best = smaller(x, best);
    largest = larger(magnitude_bits<T>(x), largest);
  }

  // Lowest position of this value, found through few lanes because few hold it.
  DETR_HD int64_t first_with(T value) const {
    int64_t first = std::numeric_limits<int64_t>::max();
    for (uint32_t lanes = lane_mask(best == value); lanes; lanes &= lanes - 1)
      first = std::min<int64_t>(first, where[__builtin_ctz(lanes)]);
    return first;
  }
};

// Cheapest column of a row, the lowest among equals. `taken` is +infinity where a column is gone, or null. Raises
// `largest` to the magnitude bits of all costs.
template <typename T>
DETR_HD Nearest<T> nearest_column(const T* cost, const T* taken, int64_t columns, Index<T>* largest) {
  constexpr int lanes = kLanes<T>;
  const auto value_at = [=](int64_t j) -> Value<T> {
    return taken ? load<T>(cost + j) + load<T>(taken + j) : load<T>(cost + j);
  };
  const auto numbers_at = [](int64_t j) -> Index<T> { return lane_numbers<T>() + Int<T>(j); };
  RowScan<T> even, odd;  // two independent chains hide the latency of the comparison
  int64_t j = 0;
  for (; j + 2 * lanes <= columns; j += 2 * lanes) {
    even.visit(value_at(j), numbers_at(j));
    odd.visit(value_at(j + lanes), numbers_at(j + lanes));
  }
  if (j + lanes <= columns) {
    even.visit(value_at(j), numbers_at(j));
    j += lanes;
  }
  if (j < columns && columns >= lanes) {
    odd.visit(value_at(columns - lanes), numbers_at(columns - lanes));  // meets some columns again
  } else if (j < columns) {
    Value<T> x = load_some<T>(cost, columns, kInfinity<T>);
    *largest = larger(magnitude_bits<T>(load_some<T>(cost, columns, T(0))), *largest);
    if (taken) x += load_some<T>(taken, columns, kInfinity<T>);
    odd.where = numbers_at(0);
    odd.best = x;
  }
  *largest = larger(larger(even.largest, odd.largest), *largest);
  const T least = smallest_lane(smaller(even.best, odd.best));
  if (!(least < kInfinity<T>)) return {kInfinity<T>, -1};
  return {least, std::min(even.first_with(least), odd.first_with(least))};
}

}  // namespace
}  // namespace detr::cpu
