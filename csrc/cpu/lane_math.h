// exp (of numbers <= 0), log and log1p (of numbers in [0, 1]) of SIMD lanes. float: polynomials; double: the C
// library's, lane by lane.
#pragma once

#include <cmath>

#include "../core/float_math.h"
#include "lanes.h"

namespace detr::cpu {
namespace {

template <typename T>
struct LaneMath;

template <>
struct LaneMath<float> : FloatMath<Value<float>, Index<float>> {};

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
  static DETR_HD V log1p(V x) {
    for (int k = 0; k < kLanes<double>; ++k) x[k] = std::log1p(x[k]);
    return x;
  }
};

// The same functions for one number.
template <typename T>
struct ScalarMath {
  static DETR_HD T exp(T x) { return std::exp(x); }
  static DETR_HD T log(T x) { return std::log(x); }
  static DETR_HD T log1p(T x) { return std::log1p(x); }
};

}  // namespace
}  // namespace detr::cpu
