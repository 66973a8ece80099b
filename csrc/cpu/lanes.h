// SIMD lanes on the compilers' vector extensions. A vector always holds 64 bytes, whatever the instruction set that
// the compiler maps it to, so that every instruction set returns the same bits.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#include "../core/box.h"

namespace detr::cpu {
namespace {

template <typename T>
struct LaneTypes;

template <>
struct LaneTypes<float> {
  typedef float Value __attribute__((vector_size(64)));
  typedef int32_t Int;
  typedef int32_t Index __attribute__((vector_size(64)));
};

template <>
struct LaneTypes<double> {
  typedef double Value __attribute__((vector_size(64)));
  typedef int64_t Int;
  typedef int64_t Index __attribute__((vector_size(64)));
};

template <typename T>
using Value = typename LaneTypes<T>::Value;  // of T
template <typename T>
using Index = typename LaneTypes<T>::Index;  // of integers as wide as T; also a comparison's result
template <typename T>
using Int = typename LaneTypes<T>::Int;

template <typename T>
constexpr int kLanes = 64 / sizeof(T);

template <typename T>
constexpr T kInfinity = std::numeric_limits<T>::infinity();

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

template <typename T>
DETR_HD Value<T> load(const T* from) {
  Value<T> x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

template <typename T>
DETR_HD Index<T> load_index(const Int<T>* from) {
  Index<T> x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

// The first `count` lanes from memory, `fill` in the others.
template <typename T>
DETR_HD Value<T> load_some(const T* from, int64_t count, T fill) {
  if (count >= kLanes<T>) return load<T>(from);
  T lanes[kLanes<T>];
  for (int k = 0; k < kLanes<T>; ++k) lanes[k] = k < count ? from[k] : fill;
  return load<T>(lanes);
}

template <typename T>
DETR_HD void store(T* to, Value<T> x) {
  std::memcpy(to, &x, sizeof x);
}

template <typename T>
DETR_HD void store_index(Int<T>* to, Index<T> x) {
  std::memcpy(to, &x, sizeof x);
}

template <typename T>
DETR_HD void store_some(T* to, Value<T> x, int64_t count) {
  if (count >= kLanes<T>) return store<T>(to, x);
  T lanes[kLanes<T>];
  store<T>(lanes, x);
  for (int k = 0; k < count; ++k) to[k] = lanes[k];
}

template <typename T>
DETR_HD Value<T> all_lanes(T x) {
  return x - Value<T>{};  // x - 0 keeps the sign of a zero
}

template <typename T>
DETR_HD Index<T> all_lanes_index(Int<T> x) {
  return x - Index<T>{};
}

template <typename T>
DETR_HD Index<T> lane_numbers() {
  Index<T> numbers;
  for (int k = 0; k < kLanes<T>; ++k) numbers[k] = k;
  return numbers;
}

// Lane k of the result is lane (k + distance) modulo the number of lanes.
template <int distance, typename V>
DETR_HD V rotated(V x) {
  constexpr int n = sizeof(V) / sizeof(x[0]);
  if constexpr (n == 16) {
    return __builtin_shufflevector(x, x, (0 + distance) % n, (1 + distance) % n, (2 + distance) % n, (3 + distance) % n,
                                   (4 + distance) % n, (5 + distance) % n, (6 + distance) % n, (7 + distance) % n,
                                   (8 + distance) % n, (9 + distance) % n, (10 + distance) % n, (11 + distance) % n,
                                   (12 + distance) % n, (13 + distance) % n, (14 + distance) % n, (15 + distance) % n);
  } else {
    return __builtin_shufflevector(x, x, (0 + distance) % n, (1 + distance) % n, (2 + distance) % n, (3 + distance) % n,
                                   (4 + distance) % n, (5 + distance) % n, (6 + distance) % n, (7 + distance) % n);
  }
}

// Smallest lane, for values and for indices.
template <typename V>
DETR_HD auto smallest_lane(V x) {
  constexpr int n = sizeof(V) / sizeof(x[0]);
  if constexpr (n == 16) x = smaller(x, rotated<8>(x));
  x = smaller(x, rotated<4>(x));
  x = smaller(x, rotated<2>(x));
  x = smaller(x, rotated<1>(x));
  return x[0];
}

template <typename V>
DETR_HD auto largest_lane(V x) {
  return -smallest_lane(-x);
}

// Pairwise sum in a fixed order.
template <typename V>
DETR_HD auto sum_of_lanes(V x) {
  constexpr int n = sizeof(V) / sizeof(x[0]);
  if constexpr (n == 16) x = x + rotated<8>(x);
  x = x + rotated<4>(x);
  x = x + rotated<2>(x);
  x = x + rotated<1>(x);
  return x[0];
}

// Whether a comparison holds in any lane.
template <typename I>
DETR_HD bool any_lane(I mask) {
  return smallest_lane(mask) != 0;  // true is -1
}

}  // namespace
}  // namespace detr::cpu
