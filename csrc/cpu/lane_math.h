// exp (of numbers <= 0) and log of SIMD lanes. float: polynomials, at most 2 units in the last place; double: the C
// library's, lane by lane.
#pragma once

#include <cmath>

#include "lanes.h"

namespace detr::cpu {
namespace {

template <typename T>
struct LaneMath;

template <>
struct LaneMath<float> {
  using V = Value<float>;
  using I = Index<float>;

  // exp(x) for x <= 0, which is all that softmax and sigmoid need: 2^n exp(r), |r| <= log(2) / 2, Taylor polynomial of
  // degree 7. 0 below -86, because denormal numbers are slow and padding lanes hold exp(-infinity).
  static DETR_HD V exp(V x) {
    const V clamped = larger(x, all_lanes(-86.0f));
    const V shifted = clamped * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the sum is rounded to an integer
    const V n = shifted - 12582912.0f;
    const V r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
    const V r2 = r * r;
    // In pairs, because the chain of a nested form is twice as long.
    const V low = (r + 1.0f) + r2 * (r * (1.0f / 6) + 0.5f);
    const V high = (r * (1.0f / 120) + 1.0f / 24) + r2 * (r * (1.0f / 5040) + 1.0f / 720);
    const V p = low + (r2 * r2) * high;
    I bits, exponent;
    std::memcpy(&bits, &p, sizeof bits);
    std::memcpy(&exponent, &shifted, sizeof exponent);
    bits += exponent << 23;  // the integer is in the lowest bits of the sum
    V result;
    std::memcpy(&result, &bits, sizeof result);
    return x < -86.0f ? V{} : (x == x ? result : x);
  }

  // log(x) = e log(2) + log(m), m in [sqrt(1/2), sqrt(2)), log(m) = 2 atanh((m - 1) / (m + 1)).
  static DETR_HD V log(V x) {
    const V tiny = all_lanes(std::numeric_limits<float>::min());
    const V scaled = x < tiny ? x * 8388608.0f : x;  // 2^23 lifts denormal numbers
    I bits;
    std::memcpy(&bits, &scaled, sizeof bits);
    const I shifted = bits - 0x3f3504f3;  // sqrt(1/2)
    const I exponent = (shifted >> 23) - (x < tiny ? all_lanes_index<float>(23) : I{});
    const I mantissa = (shifted & 0x007fffff) + 0x3f3504f3;
    V m;
    std::memcpy(&m, &mantissa, sizeof m);
    const V s = (m - 1.0f) / (m + 1.0f);
    const V z = s * s;
    V p = all_lanes(2.0f / 9);
    p = p * z + 2.0f / 7;
    p = p * z + 2.0f / 5;
    p = p * z + 2.0f / 3;
    const V e = __builtin_convertvector(exponent, V);
    const V result = (2.0f * s + (s * z * p + e * -2.12194440e-4f)) + e * 0.693359375f;
    const V infinite = all_lanes(kInfinity<float>);
    const V special =
        x == 0 ? -infinite : (x == infinite ? infinite : all_lanes(std::numeric_limits<float>::quiet_NaN()));
    return (x > 0) & (x < infinite) ? result : special;
  }
};

template <>
struct LaneMath<double> {
  using V = Value<double>;
  static DETR_HD V exp(V x) {
    for (int k = 0; k < kLanes<double>; ++k) x[k] = std::exp(x[k]);
    return x;
  }
  static DETR_HD V log(V x) {
    for (int k = 0; k < kLanes<double>; ++k) x[k] = std::log(x[k]);
    return x;
  }
};

// The same functions for one number.
template <typename T>
struct ScalarMath {
  static DETR_HD T exp(T x) { return std::exp(x); }
  static DETR_HD T log(T x) { return std::log(x); }
};

}  // namespace
}  // namespace detr::cpu
