// Arrays of any floating type: reading converts to the type a kernel computes in, writing back.
#pragma once

#include <cuda_runtime.h>

#include "../core/half.h"
#include "../kernels.h"

namespace detr::cuda {

// Stored elements. Half types are their bits: conversion is core/half.h's, the CPU kernels' own.
struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <typename T>
__device__ __forceinline__ T number(float x) {
  return T(x);
}
template <typename T>
__device__ __forceinline__ T number(double x) {
  return T(x);
}
template <typename T>
__device__ __forceinline__ T number(Float16 x) {
  return T(from_float16(x.bits));
}
template <typename T>
__device__ __forceinline__ T number(BFloat16 x) {
  return T(from_bfloat16(x.bits));
}

// body(E{}) with the stored type.
template <typename Body>
__host__ __device__ __forceinline__ auto with_element_type(ElementType type, Body body) {
  switch (type) {
    case ElementType::kFloat64:
      return body(double{});
    case ElementType::kFloat16:
      return body(Float16{});
    case ElementType::kBFloat16:
      return body(BFloat16{});
    default:
      return body(float{});
  }
}

// Elements of type E as T; E = void is known at run time only, for what is read once.
template <typename T, typename E = void>
struct Reader {
  const E* data;
  __host__ __device__ explicit Reader(const Elements& from) : data(static_cast<const E*>(from.data)) {}
  __device__ __forceinline__ T operator()(int64_t k) const { return number<T>(data[k]); }
};

template <typename T>
struct Reader<T, void> {
  Elements from;
  __host__ __device__ explicit Reader(const Elements& from) : from(from) {}
  __device__ __forceinline__ T operator()(int64_t k) const {
    return with_element_type(from.type,
                             [&](auto tag) { return number<T>(static_cast<const decltype(tag)*>(from.data)[k]); });
  }
};

template <typename T>
__device__ __forceinline__ CentreBox<T> read_box(const Elements& from, int64_t row) {
  const Reader<T> read(from);
  return {read(4 * row), read(4 * row + 1), read(4 * row + 2), read(4 * row + 3)};
}

template <typename T>
__device__ __forceinline__ CentreBox<T> target_box(const float* boxes, int64_t row) {
  const float* box = boxes + 4 * row;  // read-only loads, which stores to other arrays do not hold up
  return {T(__ldg(box)), T(__ldg(box + 1)), T(__ldg(box + 2)), T(__ldg(box + 3))};
}

__device__ __forceinline__ void put(double* to, double x) { *to = x; }
__device__ __forceinline__ void put(float* to, double x) { *to = float(x); }
__device__ __forceinline__ void put(float* to, float x) { *to = x; }
__device__ __forceinline__ void put(double* to, float x) { *to = x; }
__device__ __forceinline__ void put(Float16* to, float x) { to->bits = to_float16(x); }
__device__ __forceinline__ void put(Float16* to, double x) { to->bits = to_float16(float(x)); }
__device__ __forceinline__ void put(BFloat16* to, float x) { to->bits = to_bfloat16(x); }
__device__ __forceinline__ void put(BFloat16* to, double x) { to->bits = to_bfloat16(float(x)); }

}  // namespace detr::cuda
