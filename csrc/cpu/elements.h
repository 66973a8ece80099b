// Rows of logits and boxes in any floating type, converted to the type a kernel computes in.
#pragma once

#include <cstdint>
#include <cstring>

#include "../kernels.h"
#include "lanes.h"

namespace detr::cpu {
namespace {

DETR_HD float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

DETR_HD uint32_t to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

DETR_HD float from_bfloat16(uint16_t x) { return from_bits(uint32_t(x) << 16); }

DETR_HD float from_float16(uint16_t x) {
  // Exponent and mantissa in place, then a multiplication by 2^112 corrects the bias, denormal numbers included.
  const uint32_t magnitude = uint32_t(x & 0x7fff) << 13;
  const float scaled = from_bits(magnitude) * from_bits(0x77800000);
  const uint32_t special = (x & 0x7c00) == 0x7c00 ? (magnitude | 0x7f800000) : to_bits(scaled);
  return from_bits(special | uint32_t(x & 0x8000) << 16);
}

DETR_HD uint16_t to_bfloat16(float x) {
  const uint32_t bits = to_bits(x);
  if (x != x) return uint16_t(bits >> 16 | 0x40);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);  // to nearest, ties to even
}

DETR_HD uint16_t to_float16(float x) {
  const uint32_t sign = to_bits(x) >> 16 & 0x8000;
  const uint32_t bits = to_bits(x) & 0x7fffffff;
  if (bits > 0x7f800000) return uint16_t(sign | 0x7e00);   // NaN
  if (bits >= 0x477ff000) return uint16_t(sign | 0x7c00);  // rounds to infinity
  if (bits < 0x38800000) {  // below the normal range: adding 0.5 makes the hardware round at 2^-24
    return uint16_t(sign | (to_bits(from_bits(bits) + 0.5f) - 0x3f000000));
  }
  return uint16_t(sign | (bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13);
}

// Row `row` of a [rows, width] array, as T.
template <typename T>
DETR_HD void load_row(const Elements& from, int64_t row, int64_t width, T* to) {
  const int64_t begin = row * width;
  switch (from.type) {
    case ElementType::kFloat64:
      for (int64_t k = 0; k < width; ++k) to[k] = T(static_cast<const double*>(from.data)[begin + k]);
      break;
    case ElementType::kFloat32:
      for (int64_t k = 0; k < width; ++k) to[k] = static_cast<const float*>(from.data)[begin + k];
      break;
    case ElementType::kFloat16:
      for (int64_t k = 0; k < width; ++k) to[k] = from_float16(static_cast<const uint16_t*>(from.data)[begin + k]);
      break;
    case ElementType::kBFloat16:
      for (int64_t k = 0; k < width; ++k) to[k] = from_bfloat16(static_cast<const uint16_t*>(from.data)[begin + k]);
      break;
  }
}

template <typename T>
DETR_HD CentreBox<T> load_box(const Elements& from, int64_t row) {
  T box[4] = {};
  load_row<T>(from, row, 4, box);
  return {box[0], box[1], box[2], box[3]};
}

// x [count] * scale into elements `at` and following of an array of any floating type.
template <typename T>
DETR_HD void store_scaled(void* to, ElementType type, int64_t at, int64_t count, const T* x, T scale) {
  switch (type) {
    case ElementType::kFloat64:
      for (int64_t k = 0; k < count; ++k) static_cast<double*>(to)[at + k] = x[k] * scale;
      break;
    case ElementType::kFloat32:
      for (int64_t k = 0; k < count; ++k) static_cast<float*>(to)[at + k] = float(x[k] * scale);
      break;
    case ElementType::kFloat16:
      for (int64_t k = 0; k < count; ++k) static_cast<uint16_t*>(to)[at + k] = to_float16(float(x[k] * scale));
      break;
    case ElementType::kBFloat16:
      for (int64_t k = 0; k < count; ++k) static_cast<uint16_t*>(to)[at + k] = to_bfloat16(float(x[k] * scale));
      break;
  }
}

}  // namespace
}  // namespace detr::cpu
