// Compares float_math.h with double precision, and its special values: built and run by test_float_math.py.
#include "../../csrc/core/float_math.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>

namespace {

using Math = detr::FloatMath<float, int32_t>;
using Limits = std::numeric_limits<float>;

constexpr double kMostUnits = 2;  // in the last place
constexpr uint32_t kStride = 101;

double units_off(float got, double want) {
  const double unit = std::ldexp(1.0, std::max(std::ilogb(want), Limits::min_exponent - 1) - (Limits::digits - 1));
  const double units = std::abs(got - want) / unit;
  return std::isnan(units) ? HUGE_VAL : units;
}

// Every kStride-th float between two of the same sign, in the order of their magnitudes, and the last.
template <float function(float)>
bool is_accurate(const char* name, double reference(double), float first, float last) {
  const uint32_t end = detr::bit_cast<uint32_t>(last);
  double worst = 0;
  float worst_at = first;
  const auto compare = [&](uint32_t bits) {
    const float x = detr::bit_cast<float>(bits);
    const double units = units_off(function(x), reference(x));
    if (units > worst) worst = units, worst_at = x;
  };
  for (uint32_t bits = detr::bit_cast<uint32_t>(first); bits < end; bits += kStride) compare(bits);
  compare(end);
  std::printf("%s: at worst %.3f units, at %.9g\n", name, worst, worst_at);
  return worst <= kMostUnits;
}

bool are_special_values_right() {
  const float infinity = Limits::infinity(), nan = Limits::quiet_NaN();
  const struct {
    const char* name;
    float (*function)(float);
    float x, want;
  } cases[] = {
      {"exp", Math::exp, 0, 1},
      {"exp", Math::exp, std::nextafter(-86.0f, -infinity), 0},
      {"exp", Math::exp, -1000, 0},
      {"exp", Math::exp, Limits::lowest(), 0},
      {"exp", Math::exp, -infinity, 0},
      {"exp", Math::exp, nan, nan},
      {"log", Math::log, 0, -infinity},
      {"log", Math::log, -0.0f, -infinity},
      {"log", Math::log, 1, 0},
      {"log", Math::log, infinity, infinity},
      {"log", Math::log, -Limits::denorm_min(), nan},
      {"log", Math::log, -1, nan},
      {"log", Math::log, -infinity, nan},
      {"log", Math::log, nan, nan},
      {"log1p", Math::log1p, 0, 0},
      {"log1p", Math::log1p, nan, nan},
  };
  bool right = true;
  for (const auto& [name, function, x, want] : cases) {
    const float got = function(x);
    if (got == want || (std::isnan(got) && std::isnan(want))) continue;
    std::printf("%s(%.9g) is %.9g, must be %.9g\n", name, x, got, want);
    right = false;
  }
  return right;
}

}  // namespace

int main() {
  bool right = are_special_values_right();
  right &= is_accurate<Math::exp>("exp", std::exp, -0.0f, -86.0f);
  right &= is_accurate<Math::log>("log", std::log, Limits::denorm_min(), Limits::max());
  right &= is_accurate<Math::log1p>("log1p", std::log1p, 0, 1);
  return right ? 0 : 1;
}
