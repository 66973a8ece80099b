// SIMD lanes on the compilers' vector extensions, as wide as the instruction set that this file is compiled for.
// Every instruction set returns the same bits: minima do not depend on the order, and sums are taken in blocks of 64
// bytes whatever the width.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "../core/box.h"

namespace detr::cpu {
namespace {

// Compilers split wider vectors than the hardware's into single elements (measured: 10 times slower), hence its width.
#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <typename T>
struct LaneTypes;

template <>
struct LaneTypes<float> {
  typedef float Value __attribute__((vector_size(kVectorBytes)));
  typedef int32_t Int;
  typedef int32_t Index __attribute__((vector_size(kVectorBytes)));
};

template <>
struct LaneTypes<double> {
  typedef double Value __attribute__((vector_size(kVectorBytes)));
  typedef int64_t Int;
  typedef int64_t Index __attribute__((vector_size(kVectorBytes)));
};

template <typename T>
using Value = typename LaneTypes<T>::Value;  // of T
template <typename T>
using Index = typename LaneTypes<T>::Index;  // of integers as wide as T; also a comparison's result
template <typename T>
using Int = typename LaneTypes<T>::Int;

template <typename T>
constexpr int kLanes = kVectorBytes / sizeof(T);

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
template <int distance, typename V, size_t... k>
DETR_HD V rotated_lanes(V x, std::index_sequence<k...>) {
  return __builtin_shufflevector(x, x, ((k + distance) % sizeof...(k))...);
}

template <int distance, typename V>
DETR_HD V rotated(V x) {
  return rotated_lanes<distance>(x, std::make_index_sequence<sizeof(V) / sizeof(x[0])>());
}

// Smallest lane, for values and for indices.
template <typename V>
DETR_HD auto smallest_lane(V x) {
  constexpr int n = sizeof(V) / sizeof(x[0]);
  if constexpr (n > 8) x = smaller(x, rotated<8>(x));
  if constexpr (n > 4) x = smaller(x, rotated<4>(x));
  if constexpr (n > 2) x = smaller(x, rotated<2>(x));
  x = smaller(x, rotated<1>(x));
  return x[0];
}

template <typename V>
DETR_HD auto largest_lane(V x) {
  return -smallest_lane(-x);
}

// Sum of many numbers in an order that does not depend on the vectors' width.
template <typename T>
class BlockSum {
 public:
  // `index` is the position of x's first lane in the list of numbers.
  DETR_HD void add(int64_t index, Value<T> x) { parts_[index / kLanes<T> % kParts] += x; }

  DETR_HD T total() const {
    constexpr int n = 64 / sizeof(T);
    T lanes[n];
    for (int part = 0; part < kParts; ++part) store<T>(lanes + part * kLanes<T>, parts_[part]);
    for (int half = n / 2; half > 0; half /= 2)
      for (int k = 0; k < half; ++k) lanes[k] += lanes[k + half];
    return lanes[0];
  }

 private:
  static constexpr int kParts = 64 / kVectorBytes;
  Value<T> parts_[kParts] = {};
};

// One bit a lane of a comparison's result.
template <typename I>
DETR_HD uint32_t lane_mask(I comparison) {
  constexpr int n = sizeof(I) / sizeof(comparison[0]);
#if defined(__AVX512F__)
  if constexpr (n == 16) return _mm512_movepi32_mask((__m512i)comparison);
  if constexpr (n == 8) return _mm512_movepi64_mask((__m512i)comparison);
#elif defined(__AVX__)
  if constexpr (n == 8) return _mm256_movemask_ps((__m256)comparison);
  if constexpr (n == 4) return _mm256_movemask_pd((__m256d)comparison);
#elif defined(__SSE2__)
  if constexpr (n == 4) return _mm_movemask_ps((__m128)comparison);
  if constexpr (n == 2) return _mm_movemask_pd((__m128d)comparison);
#endif
  uint32_t mask = 0;
  for (int k = 0; k < n; ++k) mask |= comparison[k] ? 1u << k : 0u;
  return mask;
}

}  // namespace
}  // namespace detr::cpu
