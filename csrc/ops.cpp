// Schemas, tensor checks and registration of every native op: the only file that knows PyTorch (stable ABI).
#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "kernels.h"

namespace {

using detr::Batch;
using detr::ClassKind;
using detr::Elements;
using detr::ElementType;
using detr::Forbidden;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename... Parts>
void check(bool holds, const Parts&... message) {
  if (holds) return;
  std::ostringstream text;
  (text << ... << message);
  throw std::runtime_error(text.str());
}

std::string shape_of(const Tensor& tensor) {
  std::ostringstream text;
  text << '[';
  for (int64_t d = 0; d < tensor.dim(); ++d) text << (d ? ", " : "") << tensor.size(d);
  text << ']';
  return text.str();
}

// -1 stands for any size.
void check_shape(const char* op, const char* name, const Tensor& tensor, std::vector<int64_t> shape,
                 const char* letters) {
  bool fits = tensor.dim() == static_cast<int64_t>(shape.size());
  for (size_t d = 0; fits && d < shape.size(); ++d) fits = shape[d] < 0 || tensor.size(d) == shape[d];
  check(fits, op, ": ", name, " must be ", letters, ", got ", shape_of(tensor));
}

void check_type(const char* op, const char* name, const Tensor& tensor, ScalarType type, const char* type_name) {
  check(tensor.scalar_type() == type, op, ": ", name, " must be ", type_name, ", got ", toString(tensor.scalar_type()));
}

ElementType element_type(const char* op, const char* name, ScalarType type) {
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

ClassKind class_kind(const char* op, const std::string& kind) {
  if (kind == "softmax") return ClassKind::kSoftmax;
  if (kind == "focal") return ClassKind::kFocal;
  check(kind == "focal_stable", op, ": kind must be softmax, focal or focal_stable, got ", kind);
  return ClassKind::kFocalStable;
}

// Contiguous and owned for the duration of a call.
Tensor dense(const Tensor& tensor) { return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor); }

template <typename T>
constexpr ScalarType kScalarType = sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float;

Tensor new_filled(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType type, double value) {
  Tensor tensor = torch::stable::new_empty(like, shape, type);
  return torch::stable::fill_(tensor, value);
}

// Segments of a flat list of targets, whose values are checked as well. max_count is the most targets of an image, a
// number that a device kernel needs on the host; -1 if unknown.
Batch batch_of(const char* op, const Tensor& offsets, int64_t layers, int64_t queries, int64_t targets,
               int64_t max_count) {
  check_shape(op, "offsets", offsets, {-1}, "[B + 1]");
  check(offsets.size(0) >= 1, op, ": offsets must be [B + 1] with at least one entry, got [0]");
  const Batch batch = {layers, offsets.size(0) - 1, queries, targets, offsets.const_data_ptr<int32_t>()};
  check(batch.offsets[0] == 0, op, ": offsets must start with 0, got ", batch.offsets[0]);
  for (int64_t b = 0; b < batch.images; ++b) {
    check(batch.offsets[b] <= batch.offsets[b + 1], op, ": offsets must not decrease, got ", batch.offsets[b], " then ",
          batch.offsets[b + 1], " at image ", b);
    check(max_count < 0 || batch.offsets[b + 1] - batch.offsets[b] <= max_count, op, ": max_count must be at least ",
          batch.offsets[b + 1] - batch.offsets[b], ", the targets of image ", b, ", got ", max_count);
  }
  check(batch.offsets[batch.images] <= targets, op, ": offsets must not exceed the number of targets ", targets,
        ", got ", batch.offsets[batch.images]);
  return batch;
}

// The status packs a position into one integer.
void check_packable(const char* op, const Batch& batch) {
  const auto check_fits = [op](const char* name, int64_t count, int bits) {
    check(count < int64_t(1) << bits, op, ": at most ", (int64_t(1) << bits) - 1, " ", name, ", got ", count);
  };
  check_fits("layers", batch.layers, detr::kLayerBits);
  check_fits("images", batch.images, detr::kImageBits);
  check_fits("queries", batch.queries, detr::kQueryBits);
  for (int64_t b = 0; b < batch.images; ++b)
    check_fits("targets in one image", batch.offsets[b + 1] - batch.offsets[b], detr::kTargetBits);
}

// Calls work(begin, end) on several threads where there is enough to do; `cost` is the work of one item, in pairs.
template <typename F>
void in_parallel(int64_t items, double cost, F work) {
  const int64_t grain = std::max<int64_t>(1, static_cast<int64_t>(16384 / std::max(cost, 1.0)));
  torch::stable::parallel_for(0, items, grain, work);
}

// ---- assign ---------------------------------------------------------------------------------------------------------

template <typename T>
std::tuple<Tensor, Tensor, Tensor> assign_typed(const Tensor& cost_any, const Tensor& offsets_any, int64_t max_count,
                                                bool prices) {
  const Tensor cost = dense(cost_any), offsets = dense(offsets_any);
  const int64_t layers = cost.size(0), targets = cost.size(1), queries = cost.size(2);
  const Batch batch = batch_of("assign", offsets, layers, queries, targets, max_count);
  Tensor query_of_target = new_filled(cost, {layers, targets}, ScalarType::Int, -1);
  const int64_t priced = prices ? layers : 0;
  Tensor target_price = torch::stable::new_zeros(cost, {priced, targets}, kScalarType<T>);
  Tensor query_price = torch::stable::new_empty(cost, {priced, batch.images, queries}, kScalarType<T>);

  const detr::AssignmentArguments<T> arguments = {batch, cost.template const_data_ptr<T>(),
                                                  query_of_target.template mutable_data_ptr<int32_t>(),
                                                  prices ? target_price.template mutable_data_ptr<T>() : nullptr,
                                                  prices ? query_price.template mutable_data_ptr<T>() : nullptr};
  const int64_t problems = layers * batch.images;
  in_parallel(problems, double(layers) * targets * queries / std::max<int64_t>(problems, 1),
              [&](int64_t begin, int64_t end) {
                if constexpr (sizeof(T) == 8) {
                  detr::cpu::kernels().assign_double(arguments, begin, end);
                } else {
                  detr::cpu::kernels().assign_float(arguments, begin, end);
                }
              });
  return {query_of_target, target_price, query_price};
}

std::tuple<Tensor, Tensor, Tensor> assign(Tensor cost, Tensor offsets, int64_t max_count, bool prices) {
  check_shape("assign", "cost", cost, {-1, -1, -1}, "[L, T, Q]");
  check_type("assign", "offsets", offsets, ScalarType::Int, "int32");
  const ElementType type = element_type("assign", "cost", cost.scalar_type());
  check(type == ElementType::kFloat64 || type == ElementType::kFloat32, "assign: cost must be float32 or float64, got ",
        toString(cost.scalar_type()));
  return type == ElementType::kFloat64 ? assign_typed<double>(cost, offsets, max_count, prices)
                                       : assign_typed<float>(cost, offsets, max_count, prices);
}

// ---- matching_cost and match ----------------------------------------------------------------------------------------

struct CostInputs {
  Tensor logits, boxes, labels, target_boxes, offsets;
};

CostInputs checked_inputs(const char* op, const Tensor& logits, const Tensor& boxes, const Tensor& labels,
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

Elements elements(const char* op, const char* name, const Tensor& tensor) {
  return {tensor.const_data_ptr(), element_type(op, name, tensor.scalar_type())};
}

bool needs_double(const Tensor& logits, const Tensor& boxes) {
  return logits.scalar_type() == ScalarType::Double || boxes.scalar_type() == ScalarType::Double;
}

struct CostOptions {
  int64_t max_count;
  double class_weight, box_weight, giou_weight;
  std::string kind;
  double alpha, gamma;
};

template <typename T>
detr::CostArguments<T> cost_arguments(const char* op, const CostInputs& in, const CostOptions& options) {
  const Tensor& logits = in.logits;
  const Batch batch = batch_of(op, in.offsets, logits.size(0), logits.size(2), in.labels.size(0), options.max_count);
  check_packable(op, batch);
  return {batch,
          logits.size(3),
          elements(op, "logits", logits),
          elements(op, "boxes", in.boxes),
          in.labels.const_data_ptr<int64_t>(),
          in.target_boxes.const_data_ptr<float>(),
          T(options.class_weight),
          T(options.box_weight),
          T(options.giou_weight),
          class_kind(op, options.kind),
          T(options.alpha),
          T(options.gamma)};
}

void check_status(const char* op, const Tensor& status) {
  check_shape(op, "status", status, {2}, "[2]");
  check_type(op, "status", status, ScalarType::Long, "int64");
  check(status.is_contiguous(), op, ": status must be contiguous");
}

// Adds the number of forbidden pairs to the status; the position of the first of this call replaces the one before.
void add_to_status(Tensor& status, const std::vector<Forbidden>& forbidden) {
  int64_t count = 0, first = std::numeric_limits<int64_t>::max();
  for (const Forbidden& problem : forbidden) {
    count += problem.count;
    first = std::min(first, problem.first);
  }
  if (count == 0) return;
  int64_t* data = status.mutable_data_ptr<int64_t>();
  data[0] += count;
  data[1] = first;
}

// Work of one problem, in pairs: one for each logit and each pair of target and query.
template <typename T>
double work_of_problem(const detr::CostArguments<T>& a) {
  const double targets = double(a.batch.targets) / std::max<int64_t>(a.batch.images, 1);
  return double(a.batch.queries) * (double(a.classes) + targets);
}

template <typename T>
Tensor matching_cost_typed(const CostInputs& in, const CostOptions& options, Tensor& status) {
  const auto arguments = cost_arguments<T>("matching_cost", in, options);
  const Batch& batch = arguments.batch;
  const bool full = batch.offsets[batch.images] == batch.targets;
  Tensor cost = full ? torch::stable::new_empty(in.logits, {batch.layers, batch.targets, batch.queries}, kScalarType<T>)
                     : new_filled(in.logits, {batch.layers, batch.targets, batch.queries}, kScalarType<T>, 0);
  std::vector<Forbidden> forbidden(batch.layers * batch.images);
  T* out = cost.template mutable_data_ptr<T>();
  in_parallel(batch.layers * batch.images, work_of_problem(arguments), [&](int64_t begin, int64_t end) {
    if constexpr (sizeof(T) == 8) {
      detr::cpu::kernels().matching_cost_double(arguments, out, forbidden.data(), begin, end);
    } else {
      detr::cpu::kernels().matching_cost_float(arguments, out, forbidden.data(), begin, end);
    }
  });
  add_to_status(status, forbidden);
  return cost;
}

Tensor matching_cost(Tensor logits, Tensor boxes, Tensor labels, Tensor target_boxes, Tensor offsets, Tensor status,
                     int64_t max_count, double class_weight, double box_weight, double giou_weight, std::string kind,
                     double alpha, double gamma) {
  const CostInputs in = checked_inputs("matching_cost", logits, boxes, labels, target_boxes, offsets);
  check_status("matching_cost", status);
  const CostOptions options = {max_count, class_weight, box_weight, giou_weight, kind, alpha, gamma};
  return needs_double(logits, boxes) ? matching_cost_typed<double>(in, options, status)
                                     : matching_cost_typed<float>(in, options, status);
}

template <typename T>
Tensor match_typed(const CostInputs& in, const CostOptions& options, Tensor& status) {
  const auto arguments = cost_arguments<T>("match", in, options);
  const Batch& batch = arguments.batch;
  Tensor query_of_target = new_filled(in.logits, {batch.layers, batch.targets}, ScalarType::Int, -1);
  std::vector<Forbidden> forbidden(batch.layers * batch.images);
  int32_t* out = query_of_target.mutable_data_ptr<int32_t>();
  in_parallel(batch.layers * batch.images, work_of_problem(arguments), [&](int64_t begin, int64_t end) {
    if constexpr (sizeof(T) == 8) {
      detr::cpu::kernels().match_double(arguments, out, forbidden.data(), begin, end);
    } else {
      detr::cpu::kernels().match_float(arguments, out, forbidden.data(), begin, end);
    }
  });
  add_to_status(status, forbidden);
  return query_of_target;
}

Tensor match(Tensor logits, Tensor boxes, Tensor labels, Tensor target_boxes, Tensor offsets, Tensor status,
             int64_t max_count, double class_weight, double box_weight, double giou_weight, std::string kind,
             double alpha, double gamma) {
  const CostInputs in = checked_inputs("match", logits, boxes, labels, target_boxes, offsets);
  check_status("match", status);
  const CostOptions options = {max_count, class_weight, box_weight, giou_weight, kind, alpha, gamma};
  return needs_double(logits, boxes) ? match_typed<double>(in, options, status)
                                     : match_typed<float>(in, options, status);
}

// ---- set_loss -------------------------------------------------------------------------------------------------------

constexpr int64_t kTerms = 5;  // class, L1, GIoU, cardinality error, class error

// A matched target must name a query and a class that exist; the first that does not is reported with its image.
void check_matches(const Batch& batch, const int32_t* query_of_target, const int64_t* labels, int64_t limit) {
  for (int64_t layer = 0; layer < batch.layers; ++layer) {
    for (int64_t b = 0; b < batch.images; ++b) {
      for (int64_t t = batch.offsets[b]; t < batch.offsets[b + 1]; ++t) {
        const int64_t query = query_of_target[layer * batch.targets + t];
        check(query >= -1 && query < batch.queries, "set_loss: query_of_target must be in [-1, ", batch.queries,
              "), got ", query, " for layer ", layer, ", image ", b, ", target ", t - batch.offsets[b]);
        check(query < 0 || (labels[t] >= 0 && labels[t] < limit), "set_loss: labels must be in [0, ", limit, "), got ",
              labels[t], " for image ", b, ", target ", t - batch.offsets[b]);
      }
    }
  }
}

// 1 / normaliser of the class loss of each layer: the weights of all queries' classes, or the number of boxes.
template <typename T>
std::vector<T> class_scales(const Batch& batch, ClassKind kind, const int32_t* query_of_target, const int64_t* labels,
                            const T* class_weight, int64_t classes, double num_boxes) {
  std::vector<T> scales(batch.layers, T(1 / num_boxes));
  if (kind != ClassKind::kSoftmax) return scales;
  for (int64_t layer = 0; layer < batch.layers; ++layer) {
    int64_t matched = 0;
    double weights = 0;
    for (int64_t t = 0; t < batch.offsets[batch.images]; ++t) {
      if (query_of_target[layer * batch.targets + t] < 0) continue;
      ++matched;
      weights += class_weight[labels[t]];
    }
    weights += double(batch.images * batch.queries - matched) * class_weight[classes - 1];
    scales[layer] = T(1 / weights);
  }
  return scales;
}

template <typename T>
void reduce_losses(const detr::LossArguments<T>& a, T* losses) {
  const Batch& batch = a.batch;
  for (int64_t layer = 0; layer < batch.layers; ++layer) {
    detr::LossSums sums = {};
    double cardinality = 0;
    for (int64_t b = 0; b < batch.images; ++b) {
      const detr::LossSums& image = a.sums[layer * batch.images + b];
      sums.class_loss += image.class_loss;
      sums.box_loss += image.box_loss;
      sums.giou_loss += image.giou_loss;
      sums.correct += image.correct;
      sums.matched += image.matched;
      cardinality += std::abs(image.objects_predicted - double(batch.offsets[b + 1] - batch.offsets[b]));
    }
    T* out = losses + layer * kTerms;
    out[0] = T(sums.class_loss * double(a.class_scale[layer]));
    out[1] = T(sums.box_loss * double(a.box_scale));
    out[2] = T(sums.giou_loss * double(a.box_scale));
    out[3] = T(cardinality / double(std::max<int64_t>(batch.images, 1)));
    out[4] = T(sums.matched > 0 ? 100 - 100 * sums.correct / sums.matched : 100);
  }
}

double read_scalar(const char* name, const Tensor& tensor) {
  check(tensor.dim() == 0, "set_loss: ", name, " must have no dimensions, got ", shape_of(tensor));
  if (tensor.scalar_type() == ScalarType::Double) return *tensor.const_data_ptr<double>();
  check_type("set_loss", name, tensor, ScalarType::Float, "float32 or float64");
  return *tensor.const_data_ptr<float>();
}

struct LossOptions {
  std::string kind;
  double alpha, gamma;
};

template <typename T>
std::tuple<Tensor, Tensor, Tensor> set_loss_typed(const CostInputs& in, const Tensor& query_of_target_any,
                                                  const Tensor& num_boxes, const std::optional<Tensor>& class_weight,
                                                  const LossOptions& options) {
  const Tensor query_of_target = dense(query_of_target_any);
  const int64_t layers = in.logits.size(0), images = in.logits.size(1), queries = in.logits.size(2);
  const int64_t classes = in.logits.size(3);
  const Batch batch = batch_of("set_loss", in.offsets, layers, queries, in.labels.size(0), -1);
  const ClassKind kind = class_kind("set_loss", options.kind);
  const int32_t* matches = query_of_target.const_data_ptr<int32_t>();
  const int64_t* labels = in.labels.const_data_ptr<int64_t>();
  check_matches(batch, matches, labels, detr::label_limit(kind, classes));

  std::vector<T> weights(classes, T(1));
  if (class_weight) {
    const Tensor dense_weight = dense(*class_weight);
    for (int64_t c = 0; c < classes; ++c) weights[c] = T(dense_weight.const_data_ptr<float>()[c]);
  }
  const double boxes_count = read_scalar("num_boxes", num_boxes);
  const auto scales = class_scales<T>(batch, kind, matches, labels, weights.data(), classes, boxes_count);

  Tensor losses = torch::stable::new_empty(in.logits, {layers, kTerms}, kScalarType<T>);
  Tensor logits_gradient = torch::stable::new_empty(in.logits, {layers, images, queries, classes}, kScalarType<T>);
  Tensor boxes_gradient = torch::stable::new_empty(in.logits, {layers, images, queries, 8}, kScalarType<T>);
  std::vector<detr::LossSums> sums(layers * images);
  const detr::LossArguments<T> arguments = {batch,
                                            classes,
                                            elements("set_loss", "logits", in.logits),
                                            elements("set_loss", "boxes", in.boxes),
                                            matches,
                                            labels,
                                            in.target_boxes.const_data_ptr<float>(),
                                            weights.data(),
                                            scales.data(),
                                            T(1 / boxes_count),
                                            kind,
                                            T(options.alpha),
                                            T(options.gamma),
                                            sums.data(),
                                            logits_gradient.template mutable_data_ptr<T>(),
                                            boxes_gradient.template mutable_data_ptr<T>()};
  in_parallel(layers * images, double(queries) * double(classes), [&](int64_t begin, int64_t end) {
    if constexpr (sizeof(T) == 8) {
      detr::cpu::kernels().set_loss_double(arguments, begin, end);
    } else {
      detr::cpu::kernels().set_loss_float(arguments, begin, end);
    }
  });
  reduce_losses(arguments, losses.template mutable_data_ptr<T>());
  return {losses, logits_gradient, boxes_gradient};
}

std::tuple<Tensor, Tensor, Tensor> set_loss(Tensor logits, Tensor boxes, Tensor query_of_target, Tensor labels,
                                            Tensor target_boxes, Tensor offsets, Tensor num_boxes,
                                            std::optional<Tensor> class_weight, std::string kind, double alpha,
                                            double gamma) {
  const CostInputs in = checked_inputs("set_loss", logits, boxes, labels, target_boxes, offsets);
  check_shape("set_loss", "query_of_target", query_of_target, {logits.size(0), labels.size(0)}, "[L, T]");
  check_type("set_loss", "query_of_target", query_of_target, ScalarType::Int, "int32");
  if (class_weight) {
    check_shape("set_loss", "class_weight", *class_weight, {logits.size(3)}, "[C] as logits");
    check_type("set_loss", "class_weight", *class_weight, ScalarType::Float, "float32");
  }
  const LossOptions options = {kind, alpha, gamma};
  return needs_double(logits, boxes) ? set_loss_typed<double>(in, query_of_target, num_boxes, class_weight, options)
                                     : set_loss_typed<float>(in, query_of_target, num_boxes, class_weight, options);
}

template <typename T>
std::tuple<Tensor, Tensor> scale_typed(const Tensor& loss_gradient, const Tensor& logits_gradient,
                                       const Tensor& boxes_gradient, ScalarType logits_type, ScalarType boxes_type) {
  const Tensor incoming = dense(loss_gradient), logits = dense(logits_gradient), boxes = dense(boxes_gradient);
  const int64_t layers = logits.size(0), images = logits.size(1), queries = logits.size(2), classes = logits.size(3);
  Tensor scaled_logits = torch::stable::new_empty(logits, {layers, images, queries, classes}, logits_type);
  Tensor scaled_boxes = torch::stable::new_empty(boxes, {layers, images, queries, 4}, boxes_type);
  const detr::ScaleArguments<T> arguments = {layers,
                                             images * queries * classes,
                                             images * queries,
                                             incoming.template const_data_ptr<T>(),
                                             incoming.size(1),
                                             logits.template const_data_ptr<T>(),
                                             boxes.template const_data_ptr<T>(),
                                             scaled_logits.mutable_data_ptr(),
                                             element_type("set_loss_backward", "logits", logits_type),
                                             scaled_boxes.mutable_data_ptr(),
                                             element_type("set_loss_backward", "boxes", boxes_type)};
  in_parallel(layers * images * queries, double(classes), [&](int64_t begin, int64_t end) {
    if constexpr (sizeof(T) == 8) {
      detr::cpu::kernels().scale_gradients_double(arguments, begin, end);
    } else {
      detr::cpu::kernels().scale_gradients_float(arguments, begin, end);
    }
  });
  return {scaled_logits, scaled_boxes};
}

std::tuple<Tensor, Tensor> set_loss_backward(Tensor loss_gradient, Tensor logits_gradient, Tensor boxes_gradient,
                                             ScalarType logits_type, ScalarType boxes_type) {
  const char* op = "set_loss_backward";
  check_shape(op, "logits_gradient", logits_gradient, {-1, -1, -1, -1}, "[L, B, Q, C]");
  check_shape(op, "loss_gradient", loss_gradient, {logits_gradient.size(0), kTerms}, "[L, 5]");
  check_shape(op, "boxes_gradient", boxes_gradient,
              {logits_gradient.size(0), logits_gradient.size(1), logits_gradient.size(2), 8}, "[L, B, Q, 8]");
  const ScalarType type = logits_gradient.scalar_type();
  check(type == ScalarType::Double || type == ScalarType::Float, op, ": logits_gradient must be float32 or float64");
  check_type(op, "loss_gradient", loss_gradient, type, "of the same type as logits_gradient");
  check_type(op, "boxes_gradient", boxes_gradient, type, "of the same type as logits_gradient");
  return type == ScalarType::Double
             ? scale_typed<double>(loss_gradient, logits_gradient, boxes_gradient, logits_type, boxes_type)
             : scale_typed<float>(loss_gradient, logits_gradient, boxes_gradient, logits_type, boxes_type);
}

}  // namespace

STABLE_TORCH_LIBRARY(detr_fast, m) {
  m.def("assign(Tensor cost, Tensor offsets, SymInt max_count, bool prices) -> (Tensor, Tensor, Tensor)");
  m.def(
      "matching_cost(Tensor logits, Tensor boxes, Tensor labels, Tensor target_boxes, Tensor offsets, Tensor(a!) "
      "status, "
      "SymInt max_count, float class_weight, float box_weight, float giou_weight, str kind, float alpha, float gamma) "
      "-> Tensor");
  m.def(
      "match(Tensor logits, Tensor boxes, Tensor labels, Tensor target_boxes, Tensor offsets, Tensor(a!) status, "
      "SymInt max_count, float class_weight, float box_weight, float giou_weight, str kind, float alpha, float gamma) "
      "-> Tensor");
  m.def(
      "set_loss(Tensor logits, Tensor boxes, Tensor query_of_target, Tensor labels, Tensor target_boxes, Tensor "
      "offsets, "
      "Tensor num_boxes, Tensor? class_weight, str kind, float alpha, float gamma) -> (Tensor, Tensor, Tensor)");
  m.def(
      "set_loss_backward(Tensor loss_gradient, Tensor logits_gradient, Tensor boxes_gradient, ScalarType logits_type, "
      "ScalarType boxes_type) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(detr_fast, CPU, m) {
  m.impl("assign", TORCH_BOX(&assign));
  m.impl("matching_cost", TORCH_BOX(&matching_cost));
  m.impl("match", TORCH_BOX(&match));
  m.impl("set_loss", TORCH_BOX(&set_loss));
  m.impl("set_loss_backward", TORCH_BOX(&set_loss_backward));
}

namespace {

PyObject* instruction_set(PyObject*, PyObject*) { return PyUnicode_FromString(detr::cpu::kernels().name); }

PyObject* use_instruction_set(PyObject*, PyObject* name) {
  PyObject* bytes = PyUnicode_AsUTF8String(name);
  if (!bytes) return nullptr;
  const bool known = detr::cpu::use_instruction_set(PyBytes_AsString(bytes));
  Py_DECREF(bytes);
  return PyBool_FromLong(known);
}

PyMethodDef methods[] = {
    {"instruction_set", instruction_set, METH_NOARGS, "Name of the instruction set whose kernels run."},
    {"use_instruction_set", use_instruction_set, METH_O,
     "Chooses one by name, for tests; False if it is not available."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

// Importing detr_fast._C loads the library, which runs the registrations above.
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
