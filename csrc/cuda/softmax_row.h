// Sums over one row of logits by a team of 16 lanes: lane k takes the classes k, k + 16, ... That is the order of
// BlockSum in cpu/lanes.h, so float sums have the same bits on a CPU.
#pragma once

#include "../core/float_math.h"
#include "group.h"

namespace detr::cuda {

constexpr int kTeam = 16;

// exp (of numbers <= 0), log and log1p (of numbers in [0, 1]) of numbers.
template <typename T>
struct Math;

template <>
struct Math<float> : FloatMath<float, int32_t> {};

template <>
struct Math<double> {
  static __device__ __forceinline__ double exp(double x) { return ::exp(x); }
  static __device__ __forceinline__ double log(double x) { return ::log(x); }
  static __device__ __forceinline__ double log1p(double x) { return ::log1p(x); }
};

template <typename T>
__device__ __forceinline__ T team_sum(T x) {
#pragma unroll
  for (int distance = kTeam / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(kAllLanes, x, distance);
  return x;
}

// Of numbers without NaN.
template <typename T>
__device__ __forceinline__ T team_largest(T x) {
#pragma unroll
  for (int distance = kTeam / 2; distance > 0; distance /= 2) x = larger(x, __shfl_xor_sync(kAllLanes, x, distance));
  return x;
}

}  // namespace detr::cuda
