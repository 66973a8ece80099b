// SIMD lanes on the compilers' vector extensions, as wide as the instruction set that this file is compiled for.
// Every instruction set returns the same bits: minima do not depend on the order, and sums are taken in blocks of 64
// bytes whatever the width.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
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

// Lane k of the result is lane k ^ distance: a permutation that hardware does within 16 bytes for small distances.
template <int distance, typename V, size_t... k>
DETR_HD V exchanged_lanes(V x, std::index_sequence<k...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(x, x, (k ^ distance)...);
#else
  typedef decltype(x < x) Lanes;
  return __builtin_shuffle(x, Lanes{static_cast<std::remove_reference_t<decltype(Lanes{}[0])>>(k ^ distance)...});
#endif
}

template <int distance, typename V>
DETR_HD V exchanged(V x) {
  return exchanged_lanes<distance>(x, std::make_index_sequence<sizeof(V) / sizeof(x[0])>());
}

// All lanes combined in a fixed order, the halves first and neighbours last; every lane holds the result.
template <typename V, typename F>
DETR_HD V reduced(V x, F combine) {
  constexpr int n = sizeof(V) / sizeof(x[0]);
  if constexpr (n > 8) x = combine(x, exchanged<8>(x));
  if constexpr (n > 4) x = combine(x, exchanged<4>(x));
  if constexpr (n > 2) x = combine(x, exchanged<2>(x));
  return combine(x, exchanged<1>(x));
}

// Integers in the order of the numbers, because integer minima have a third of the latency; its own inverse.
DETR_HD Index<float> sortable(Index<float> bits) { return bits ^ ((bits >> 31) & 0x7fffffff); }

template <typename V>
DETR_HD auto smallest_lane(V x) {
  const auto least = [](auto a, auto b) { return smaller(a, b); };
  if constexpr (std::is_same_v<V, Value<float>>) {
    Index<float> bits;
    std::memcpy(&bits, &x, sizeof bits);
    bits = sortable(reduced(sortable(bits), least));
    std::memcpy(&x, &bits, sizeof x);
    return x[0];
  } else {
    return reduced(x, least)[0];
  }
}

// The same for numbers of which none is negative: their bits are in order as they are.
template <typename V>
DETR_HD auto smallest_nonnegative_lane(V x) {
  decltype(x < x) bits;
  std::memcpy(&bits, &x, sizeof bits);
  bits = reduced(bits, [](auto a, auto b) { return smaller(a, b); });
  std::memcpy(&x, &bits, sizeof x);
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
    Value<T> sum = parts_[0];
    if constexpr (kParts == 2) sum = parts_[0] + parts_[1];
    if constexpr (kParts == 4) sum = (parts_[0] + parts_[2]) + (parts_[1] + parts_[3]);
    return reduced(sum, [](Value<T> a, Value<T> b) { return a + b; })[0];
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
