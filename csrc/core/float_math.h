// exp (of numbers <= 0), log and log1p (of numbers in [0, 1]) of float by polynomials, for scalars and for SIMD lanes:
// the same bits on every machine, at most 2 units in the last place. Needs a build without fused multiply-adds.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#include "box.h"

namespace detr {

template <typename To, typename From>
DETR_HD To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// V is float or lanes of float, I the integers of the same shape.
template <typename V, typename I>
struct FloatMath {
  // exp(x) for x <= 0, which is all that softmax and sigmoid need: 2^n exp(r), |r| <= log(2) / 2, Taylor polynomial of
  // degree 7. 0 below -86, because denormal numbers are slow and padding lanes hold exp(-infinity).
  static DETR_HD V exp(V x) {
    const V clamped = larger(x, V{} - 86.0f);
    const V shifted = clamped * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the sum is rounded to an integer
    const V n = shifted - 12582912.0f;
    const V r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
    const V r2 = r * r;
    // In pairs, because the chain of a nested form is twice as long.
    const V low = (r + 1.0f) + r2 * (r * (1.0f / 6) + 0.5f);
    const V high = (r * (1.0f / 120) + 1.0f / 24) + r2 * (r * (1.0f / 5040) + 1.0f / 720);
    const V p = low + (r2 * r2) * high;
    // The integer is in the lowest bits of the sum.
    const V result = bit_cast<V>(bit_cast<I>(p) + shift_left<23>(bit_cast<I>(shifted)));
    return x < -86.0f ? V{} : (x == x ? result : x);
  }

  // log(x) = e log(2) + log(m), m in [sqrt(1/2), sqrt(2)), log(m) = 2 atanh((m - 1) / (m + 1)).
  static DETR_HD V log(V x) {
    const V tiny = V{} + std::numeric_limits<float>::min();
    const V scaled = x < tiny ? x * 8388608.0f : x;              // 2^23 lifts denormal numbers
    const I shifted = bit_cast<I>(scaled) - (I{} + 0x3f3504f3);  // sqrt(1/2)
    const I exponent = (shifted >> 23) - (x < tiny ? I{} + 23 : I{});
    const V m = bit_cast<V>((shifted & 0x007fffff) + 0x3f3504f3);
    const V s = (m - 1.0f) / (m + 1.0f);
    const V z = s * s;
    V p = V{} + 2.0f / 9;
    p = p * z + 2.0f / 7;
    p = p * z + 2.0f / 5;
    p = p * z + 2.0f / 3;
    const V e = converted(exponent);
    const V result = (2.0f * s + (s * z * p + e * -2.12194440e-4f)) + e * 0.693359375f;
    const V infinite = V{} + std::numeric_limits<float>::infinity();
    const V special = x == 0 ? -infinite : (x == infinite ? infinite : V{} + std::numeric_limits<float>::quiet_NaN());
    const auto is_ordinary = (x > 0) & (x < infinite);
    return is_ordinary ? result : special;
  }

  // log(1 + x) for x in [0, 1], NaN stays: 2 atanh(s), s = x / (2 + x) <= 1/3; minimax polynomial, relative error 6e-9.
  static DETR_HD V log1p(V x) {
    const V s = x / (x + 2.0f);
    const V z = s * s;
    V p = V{} + 0.14005994f;
    p = p * z + 0.14000902f;
    p = p * z + 0.20010764f;
    p = p * z + 0.33333208f;
    return 2.0f * s + 2.0f * s * (z * p);
  }

 private:
  // Bits that leave on the left are dropped, for negative numbers as well.
  template <int count, typename N>
  static DETR_HD N shift_left(N x) {
    if constexpr (sizeof(N) == sizeof(int32_t)) {
      return N(uint32_t(x) << count);
    } else {
      return x << count;
    }
  }

  template <typename N>
  static DETR_HD V converted(N x) {
    if constexpr (sizeof(N) == sizeof(int32_t)) {
      return V(x);
    } else {
      return __builtin_convertvector(x, V);
    }
  }
};

}  // namespace detr
