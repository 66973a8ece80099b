// Rows of logits and boxes in any floating type, converted to the type a kernel computes in.
#pragma once

#include <cstdint>

#include "../core/half.h"
#include "../core/loss_gradient.h"
#include "../kernels.h"
#include "lanes.h"

namespace detr::cpu {
namespace {

// Calls use(at), where at(k) is element k as T; the type is looked at once.
template <typename T, typename Use>
DETR_HD void with_reader(const Elements& from, Use use) {
  switch (from.type) {
    case ElementType::kFloat64:
      return use([x = static_cast<const double*>(from.data)](int64_t k) { return T(x[k]); });
    case ElementType::kFloat32:
      return use([x = static_cast<const float*>(from.data)](int64_t k) { return T(x[k]); });
    case ElementType::kFloat16:
      return use([x = static_cast<const uint16_t*>(from.data)](int64_t k) { return T(from_float16(x[k])); });
    case ElementType::kBFloat16:
      return use([x = static_cast<const uint16_t*>(from.data)](int64_t k) { return T(from_bfloat16(x[k])); });
  }
}

// Row `row` of a [rows, width] array, as T.
template <typename T>
DETR_HD void load_row(const Elements& from, int64_t row, int64_t width, T* to) {
  with_reader<T>(from, [=](auto at) {
    for (int64_t k = 0; k < width; ++k) to[k] = at(row * width + k);
  });
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
      for (int64_t k = 0; k < count; ++k) static_cast<double*>(to)[at + k] = scaled(x[k], scale);
      break;
    case ElementType::kFloat32:
      for (int64_t k = 0; k < count; ++k) static_cast<float*>(to)[at + k] = float(scaled(x[k], scale));
      break;
    case ElementType::kFloat16:
      for (int64_t k = 0; k < count; ++k) static_cast<uint16_t*>(to)[at + k] = to_float16(float(scaled(x[k], scale)));
      break;
    case ElementType::kBFloat16:
      for (int64_t k = 0; k < count; ++k) static_cast<uint16_t*>(to)[at + k] = to_bfloat16(float(scaled(x[k], scale)));
      break;
  }
}

}  // namespace
}  // namespace detr::cpu
