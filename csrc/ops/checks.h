// Checks of tensors that all ops share. A message names the op, the argument, what it must be and what it was.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "../kernels.h"

namespace detr::ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename... Parts>
void check(bool holds, const Parts&... message) {
  if (holds) return;
  std::ostringstream text;
  (text << ... << message);
  throw std::runtime_error(text.str());
}

inline std::string listed(const std::vector<int64_t>& sizes) {
  std::ostringstream text;
  text << '[';
  for (size_t d = 0; d < sizes.size(); ++d) text << (d ? ", " : "") << sizes[d];
  text << ']';
  return text.str();
}

inline std::string shape_of(const Tensor& tensor) {
  std::vector<int64_t> sizes;
  for (int64_t d = 0; d < tensor.dim(); ++d) sizes.push_back(tensor.size(d));
  return listed(sizes);
}

// -1 stands for any size; sizes that are all known are named.
inline void check_shape(const char* op, const char* name, const Tensor& tensor, std::vector<int64_t> shape,
                        const char* letters) {
  bool fits = tensor.dim() == static_cast<int64_t>(shape.size()), known = !shape.empty();
  for (size_t d = 0; d < shape.size(); ++d) {
    fits = fits && (shape[d] < 0 || tensor.size(d) == shape[d]);
    known = known && shape[d] >= 0;
  }
  if (fits) return;
  check(false, op, ": ", name, " must be ", letters, known ? ", here " + listed(shape) : std::string(), ", got ",
        shape_of(tensor));
}

inline void check_type(const char* op, const char* name, const Tensor& tensor, ScalarType type, const char* type_name) {
  check(tensor.scalar_type() == type, op, ": ", name, " must be ", type_name, ", got ", toString(tensor.scalar_type()));
}

inline ElementType element_type(const char* op, const char* name, ScalarType type) {
  switch (type) {
    case ScalarType::Double:
      return ElementType::kFloat64;
    case ScalarType::Float:
      return ElementType::kFloat32;
    case ScalarType::Half:
      return ElementType::kFloat16;
    case ScalarType::BFloat16:
      return ElementType::kBFloat16;
    default:
      check(false, op, ": ", name, " must be float64, float32, float16 or bfloat16, got ", toString(type));
      return ElementType::kFloat32;
  }
}

inline ClassKind class_kind(const char* op, const std::string& kind) {
  if (kind == "softmax") return ClassKind::kSoftmax;
  if (kind == "focal") return ClassKind::kFocal;
  check(kind == "focal_stable", op, ": kind must be softmax, focal or focal_stable, got ", kind);
  return ClassKind::kFocalStable;
}

inline LossKind loss_kind(const char* op, const std::string& kind) {
  if (kind == "softmax") return LossKind::kSoftmax;
  if (kind == "focal" || kind == "focal_stable") return LossKind::kFocal;
  if (kind == "varifocal") return LossKind::kVarifocal;
  if (kind == "mal") return LossKind::kMal;
  check(kind == "ia_bce", op, ": kind must be softmax, focal, focal_stable, varifocal, mal or ia_bce, got ", kind);
  return LossKind::kIaBce;
}

// Numbers in which code bases differ, as detr_fast/ops/dialect.py.
template <typename T>
AreaGuard<T> area_guard(const char* op, double floor, double epsilon) {
  check(floor >= 0 && epsilon >= 0, op, ": giou_floor and giou_epsilon must be at least 0, got ", floor, " and ",
        epsilon);
  return {T(floor), T(epsilon)};
}

// Contiguous and owned for the duration of a call.
inline Tensor dense(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

template <typename T>
constexpr ScalarType kScalarType = sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float;

inline Tensor new_filled(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType type, double value) {
  Tensor tensor = torch::stable::new_empty(like, shape, type);
  return torch::stable::fill_(tensor, value);
}

inline Elements elements(const char* op, const char* name, const Tensor& tensor) {
  return {tensor.const_data_ptr(), element_type(op, name, tensor.scalar_type())};
}

// Segments of a flat list of targets. The values of offsets are not looked at.
inline Batch batch_of(const char* op, const Tensor& offsets, int64_t layers, int64_t queries, int64_t targets) {
  check_shape(op, "offsets", offsets, {-1}, "[B + 1]");
  check(offsets.size(0) >= 1, op, ": offsets must be [B + 1] with at least one entry, got [0]");
  check(targets < INT32_MAX && queries < INT32_MAX, op, ": at most 2^31 - 2 targets and queries, got ", targets,
        " and ", queries);
  return {layers, offsets.size(0) - 1, queries, targets, offsets.const_data_ptr<int32_t>()};
}

// Groups of equal size that the queries of an image are divided into; all targets are matched with each.
inline void check_groups(const char* op, const Batch& batch, int64_t groups) {
  check(groups >= 1 && groups <= std::max<int64_t>(batch.queries, 1) && batch.queries % groups == 0, op,
        ": groups must divide the ", batch.queries, " queries, got ", groups);
  check(batch.targets <= (INT32_MAX - 1) / groups, op, ": at most 2^31 - 2 targets of all groups, got ", batch.targets,
        " targets and ", groups, " groups");
}

// The values of offsets in memory of the host. max_count is the most targets of an image; -1 if unknown.
inline void check_offsets(const char* op, const Batch& batch, int64_t max_count) {
  check(batch.offsets[0] == 0, op, ": offsets must start with 0, got ", batch.offsets[0]);
  for (int64_t b = 0; b < batch.images; ++b) {
    check(batch.offsets[b] <= batch.offsets[b + 1], op, ": offsets must not decrease, got ", batch.offsets[b], " then ",
          batch.offsets[b + 1], " at image ", b);
    check(max_count < 0 || batch.offsets[b + 1] - batch.offsets[b] <= max_count, op, ": max_count must be at least ",
          batch.offsets[b + 1] - batch.offsets[b], ", the targets of image ", b, ", got ", max_count);
  }
  check(batch.offsets[batch.images] <= batch.targets, op, ": offsets must not exceed the number of targets ",
        batch.targets, ", got ", batch.offsets[batch.images]);
}

// The kernel that computes in T.
template <typename T, typename Float, typename Double>
auto kernel_of(Float of_float, Double of_double) {
  if constexpr (sizeof(T) == sizeof(double)) {
    return of_double;
  } else {
    return of_float;
  }
}

// Calls work(begin, end) on several threads where there is enough to do; `cost` is the work of one item, in pairs.
template <typename F>
void in_parallel(int64_t items, double cost, F work) {
  const int64_t grain = std::max<int64_t>(1, static_cast<int64_t>(16384 / std::max(cost, 1.0)));
  torch::stable::parallel_for(0, items, grain, work);
}

// Predictions and targets, contiguous and owned for the duration of a call.
struct CostInputs {
  Tensor logits, boxes, labels, target_boxes, offsets;
};

inline CostInputs checked_inputs(const char* op, const Tensor& logits, const Tensor& boxes, const Tensor& labels,
                                 const Tensor& target_boxes, const Tensor& offsets) {
  check_shape(op, "logits", logits, {-1, -1, -1, -1}, "[L, B, Q, C]");
  check_shape(op, "boxes", boxes, {logits.size(0), logits.size(1), logits.size(2), 4}, "[L, B, Q, 4] as logits");
  check_shape(op, "labels", labels, {-1}, "[T]");
  check_shape(op, "target_boxes", target_boxes, {labels.size(0), 4}, "[T, 4] as labels");
  check_shape(op, "offsets", offsets, {logits.size(1) + 1}, "[B + 1] with B of logits");
  check(logits.size(3) > 0, op, ": logits must have at least one class, got ", shape_of(logits));
  check_type(op, "labels", labels, ScalarType::Long, "int64");
  check_type(op, "target_boxes", target_boxes, ScalarType::Float, "float32");
  check_type(op, "offsets", offsets, ScalarType::Int, "int32");
  element_type(op, "logits", logits.scalar_type());
  element_type(op, "boxes", boxes.scalar_type());
  return {dense(logits), dense(boxes), dense(labels), dense(target_boxes), dense(offsets)};
}

inline bool needs_double(const Tensor& logits, const Tensor& boxes) {
  return logits.scalar_type() == ScalarType::Double || boxes.scalar_type() == ScalarType::Double;
}

}  // namespace detr::ops
