// Threads that work together: a warp, or a block. All threads of a group call a collective, and all get its result.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../core/float_math.h"

namespace detr::cuda {

constexpr int kWarpSize = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

template <typename T>
struct BitsOf;
template <>
struct BitsOf<float> {
  using type = uint32_t;
};
template <>
struct BitsOf<double> {
  using type = uint64_t;
};
template <typename T>
using Bits = typename BitsOf<T>::type;

template <typename T>
constexpr T kInfinity = std::numeric_limits<T>::infinity();

// Bits in the order of the numbers, for minima of integers; -0 and +0 are the same.
template <typename T>
__device__ __forceinline__ Bits<T> ordered(T x) {
  constexpr Bits<T> sign = Bits<T>(1) << (8 * sizeof(T) - 1);
  const Bits<T> bits = bit_cast<Bits<T>>(x + T(0));
  return bits & sign ? ~bits : bits | sign;
}

template <typename T>
__device__ __forceinline__ T from_ordered(Bits<T> bits) {
  constexpr Bits<T> sign = Bits<T>(1) << (8 * sizeof(T) - 1);
  return bit_cast<T>(bits & sign ? bits ^ sign : ~bits);
}

__device__ __forceinline__ float maximum(float a, float b) { return fmaxf(a, b); }
__device__ __forceinline__ double maximum(double a, double b) { return fmax(a, b); }
__device__ __forceinline__ float minimum(float a, float b) { return fminf(a, b); }
__device__ __forceinline__ double minimum(double a, double b) { return fmin(a, b); }

// 64 bits in two steps: the upper halves first.
template <typename Group>
__device__ __forceinline__ uint64_t min_in_halves(Group& group, uint64_t x) {
  const uint32_t high = group.min(uint32_t(x >> 32));
  const uint32_t low = group.min(uint32_t(x >> 32) == high ? uint32_t(x) : ~0u);
  return uint64_t(high) << 32 | low;
}

struct Warp {
  static constexpr int kSize = kWarpSize;
  int rank;

  __device__ __forceinline__ void sync() { __syncwarp(); }
  __device__ __forceinline__ uint32_t min(uint32_t x) { return __reduce_min_sync(kAllLanes, x); }
  __device__ __forceinline__ uint64_t min(uint64_t x) { return min_in_halves(*this, x); }
};

template <int threads>
struct Block {
  static constexpr int kSize = threads;
  static constexpr int kWarps = threads / kWarpSize;
  int rank;
  uint32_t (*parts)[kWarps];  // [2] shared memory; in turns, so that one barrier is enough
  int turn = 0;

  __device__ __forceinline__ void sync() { __syncthreads(); }
  __device__ __forceinline__ uint32_t min(uint32_t x) {
    turn ^= 1;
    const uint32_t own = __reduce_min_sync(kAllLanes, x);
    if (rank % kWarpSize == 0) parts[turn][rank / kWarpSize] = own;
    __syncthreads();
    const int part = rank % kWarpSize;
    return __reduce_min_sync(kAllLanes, part < kWarps ? parts[turn][part] : ~0u);
  }
  __device__ __forceinline__ uint64_t min(uint64_t x) { return min_in_halves(*this, x); }
};

// Smallest of numbers none of which is negative: their bits are in order as they are.
template <typename Group, typename T>
__device__ __forceinline__ T smallest_nonnegative(Group& group, T x) {
  return bit_cast<T>(group.min(bit_cast<Bits<T>>(x)));
}

}  // namespace detr::cuda
