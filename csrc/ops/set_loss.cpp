// The ops set_loss and set_loss_backward.
#include <cmath>
#include <limits>
#include <tuple>

#include "checks.h"
#include "device.h"

namespace detr::ops {
namespace {

using SetLoss = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // losses, total, logits_gradient, boxes_gradient
using Gradients = std::tuple<Tensor, Tensor>;                // of logits and boxes

struct LossInputs {
  CostInputs predictions;
  Tensor query_of_target;
  std::optional<Tensor> num_boxes, class_weight, loss_weight;
  LossKind kind;
  double alpha, gamma, giou_floor, giou_epsilon;
};

std::optional<Tensor> dense(const std::optional<Tensor>& tensor) {
  return tensor ? std::optional<Tensor>(ops::dense(*tensor)) : std::nullopt;
}

const float* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor ? tensor->const_data_ptr<float>() : nullptr;
}

LossInputs checked(const Tensor& logits, const Tensor& boxes, const Tensor& query_of_target, const Tensor& labels,
                   const Tensor& target_boxes, const Tensor& offsets, const std::optional<Tensor>& num_boxes,
                   const std::optional<Tensor>& class_weight, const std::optional<Tensor>& loss_weight,
                   const std::string& kind, double alpha, double gamma, double giou_floor, double giou_epsilon) {
  const char* op = "set_loss";
  const CostInputs predictions = checked_inputs(op, logits, boxes, labels, target_boxes, offsets);
  check(logits.size(1) > 0 && logits.size(2) > 0, op, ": logits must have at least one image and one query, got ",
        shape_of(logits));
  check_shape(op, "query_of_target", query_of_target, {logits.size(0), labels.size(0)}, "[L, T]");
  check_type(op, "query_of_target", query_of_target, ScalarType::Int, "int32");
  if (num_boxes) {
    check(num_boxes->dim() == 0, op, ": num_boxes must have no dimensions, got ", shape_of(*num_boxes));
    check_type(op, "num_boxes", *num_boxes, ScalarType::Float, "float32");
  }
  if (class_weight) {
    check_shape(op, "class_weight", *class_weight, {logits.size(3)}, "[C] as logits");
    check_type(op, "class_weight", *class_weight, ScalarType::Float, "float32");
  }
  if (loss_weight) {
    check_shape(op, "loss_weight", *loss_weight, {logits.size(0), kTerms}, "[L, 5]");
    check_type(op, "loss_weight", *loss_weight, ScalarType::Float, "float32");
  }
  return {predictions,
          ops::dense(query_of_target),
          dense(num_boxes),
          dense(class_weight),
          dense(loss_weight),
          loss_kind(op, kind),
          alpha,
          gamma,
          giou_floor,
          giou_epsilon};
}

Batch batch_of(const LossInputs& in) {
  const CostInputs& p = in.predictions;
  return ops::batch_of("set_loss", p.offsets, p.logits.size(0), p.logits.size(2), p.labels.size(0));
}

template <typename T>
SetLoss new_results(const CostInputs& in) {
  const int64_t layers = in.logits.size(0), images = in.logits.size(1), queries = in.logits.size(2);
  const auto empty = [&](std::initializer_list<int64_t> shape) {
    return torch::stable::new_empty(in.logits, shape, kScalarType<T>);
  };
  return {empty({layers, kTerms}), empty({}), empty({layers, images, queries, in.logits.size(3)}),
          empty({layers, images, queries, 8})};
}

struct BackwardInputs {
  std::optional<Tensor> loss_gradient, total_gradient, loss_weight;
  Tensor logits_gradient, boxes_gradient;
  ScalarType logits_type, boxes_type;
};

BackwardInputs checked(const std::optional<Tensor>& loss_gradient, const std::optional<Tensor>& total_gradient,
                       const std::optional<Tensor>& loss_weight, const Tensor& logits_gradient,
                       const Tensor& boxes_gradient, ScalarType logits_type, ScalarType boxes_type) {
  const char* op = "set_loss_backward";
  check_shape(op, "logits_gradient", logits_gradient, {-1, -1, -1, -1}, "[L, B, Q, C]");
  check_shape(op, "boxes_gradient", boxes_gradient,
              {logits_gradient.size(0), logits_gradient.size(1), logits_gradient.size(2), 8}, "[L, B, Q, 8]");
  const ScalarType type = logits_gradient.scalar_type();
  check(type == ScalarType::Double || type == ScalarType::Float, op, ": logits_gradient must be float32 or float64");
  check_type(op, "boxes_gradient", boxes_gradient, type, "of the same type as logits_gradient");
  if (loss_gradient) {
    check_shape(op, "loss_gradient", *loss_gradient, {logits_gradient.size(0), kTerms}, "[L, 5]");
    check_type(op, "loss_gradient", *loss_gradient, type, "of the same type as logits_gradient");
  }
  if (total_gradient) {
    check_shape(op, "total_gradient", *total_gradient, {}, "[]");
    check_type(op, "total_gradient", *total_gradient, type, "of the same type as logits_gradient");
  }
  if (loss_weight) {
    check_shape(op, "loss_weight", *loss_weight, {logits_gradient.size(0), kTerms}, "[L, 5]");
    check_type(op, "loss_weight", *loss_weight, ScalarType::Float, "float32");
  }
  return {dense(loss_gradient),       dense(total_gradient), dense(loss_weight), ops::dense(logits_gradient),
          ops::dense(boxes_gradient), logits_type,           boxes_type};
}

Gradients new_gradients(const BackwardInputs& in) {
  const Tensor& logits = in.logits_gradient;
  const int64_t layers = logits.size(0), images = logits.size(1), queries = logits.size(2);
  return {torch::stable::new_empty(logits, {layers, images, queries, logits.size(3)}, in.logits_type),
          torch::stable::new_empty(logits, {layers, images, queries, 4}, in.boxes_type)};
}

template <typename T>
ScaleArguments<T> arguments_of(const BackwardInputs& in, Gradients& result) {
  const Tensor& logits = in.logits_gradient;
  const char* op = "set_loss_backward";
  const int64_t queries = logits.size(1) * logits.size(2);
  return {logits.size(0),
          queries * logits.size(3),
          queries,
          in.loss_gradient ? in.loss_gradient->template const_data_ptr<T>() : nullptr,
          in.total_gradient ? in.total_gradient->template const_data_ptr<T>() : nullptr,
          data_or_null(in.loss_weight),
          logits.template const_data_ptr<T>(),
          in.boxes_gradient.template const_data_ptr<T>(),
          std::get<0>(result).mutable_data_ptr(),
          element_type(op, "logits", in.logits_type),
          std::get<1>(result).mutable_data_ptr(),
          element_type(op, "boxes", in.boxes_type)};
}

#if !defined(DETR_EMULATED)
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
std::vector<T> class_scales(const Batch& batch, LossKind kind, const int32_t* query_of_target, const int64_t* labels,
                            const std::vector<T>& class_weight, double num_boxes) {
  std::vector<T> scales(batch.layers, T(1 / num_boxes));
  if (!is_softmax(kind)) return scales;
  for (int64_t layer = 0; layer < batch.layers; ++layer) {
    int64_t matched = 0;
    double weights = 0;
    for (int64_t t = 0; t < batch.offsets[batch.images]; ++t) {
      if (query_of_target[layer * batch.targets + t] < 0) continue;
      ++matched;
      weights += class_weight[labels[t]];
    }
    weights += double(batch.images * batch.queries - matched) * class_weight.back();
    scales[layer] = T(1 / weights);
  }
  return scales;
}

template <typename T>
void reduce_losses(const LossArguments<T>& a, const float* loss_weight, T* losses, T* total) {
  const Batch& batch = a.batch;
  double weighted = 0;
  for (int64_t layer = 0; layer < batch.layers; ++layer) {
    LossSums sums = {};
    double cardinality = 0;
    for (int64_t b = 0; b < batch.images; ++b) {
      const LossSums& image = a.sums[layer * batch.images + b];
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
    out[3] = T(cardinality / double(batch.images));
    out[4] = T(sums.matched > 0 ? 100 - 100 * sums.correct / sums.matched : 100);
    for (int term = 0; loss_weight && term < kTerms; ++term) {
      const float weight = loss_weight[layer * kTerms + term];
      if (weight != 0) weighted += double(out[term]) * double(weight);
    }
  }
  *total = T(weighted);
}

template <typename T>
SetLoss set_loss_on_host(const LossInputs& in) {
  const CostInputs& p = in.predictions;
  const Batch batch = batch_of(in);
  check_offsets("set_loss", batch, -1);
  const int64_t classes = p.logits.size(3);
  const int32_t* matches = in.query_of_target.const_data_ptr<int32_t>();
  const int64_t* labels = p.labels.const_data_ptr<int64_t>();
  check_matches(batch, matches, labels, label_limit(in.kind, classes));

  std::vector<T> weights(classes, T(1));
  if (const float* given = data_or_null(in.class_weight)) std::copy(given, given + classes, weights.begin());
  const float* given_boxes = data_or_null(in.num_boxes);
  const double count = given_boxes ? *given_boxes : float(batch.offsets[batch.images]);
  const double num_boxes = count < 1 ? 1 : count;  // NaN stays
  const auto scales = class_scales<T>(batch, in.kind, matches, labels, weights, num_boxes);

  SetLoss result = new_results<T>(p);
  auto& [losses, total, logits_gradient, boxes_gradient] = result;
  std::vector<LossSums> sums(batch.layers * batch.images);
  const LossArguments<T> arguments = {batch,
                                      classes,
                                      elements("set_loss", "logits", p.logits),
                                      elements("set_loss", "boxes", p.boxes),
                                      matches,
                                      labels,
                                      p.target_boxes.const_data_ptr<float>(),
                                      weights.data(),
                                      scales.data(),
                                      T(1 / num_boxes),
                                      in.kind,
                                      T(in.alpha),
                                      T(in.gamma),
                                      area_guard<T>("set_loss", in.giou_floor, in.giou_epsilon),
                                      sums.data(),
                                      logits_gradient.template mutable_data_ptr<T>(),
                                      boxes_gradient.template mutable_data_ptr<T>()};
  const auto kernel = kernel_of<T>(cpu::kernels().set_loss_float, cpu::kernels().set_loss_double);
  in_parallel(batch.layers * batch.images, double(batch.queries) * double(classes),
              [&](int64_t begin, int64_t end) { kernel(arguments, begin, end); });
  reduce_losses(arguments, data_or_null(in.loss_weight), losses.template mutable_data_ptr<T>(),
                total.template mutable_data_ptr<T>());
  return result;
}

SetLoss set_loss(Tensor logits, Tensor boxes, Tensor query_of_target, Tensor labels, Tensor target_boxes,
                 Tensor offsets, std::optional<Tensor> num_boxes, std::optional<Tensor> class_weight,
                 std::optional<Tensor> loss_weight, std::string kind, double alpha, double gamma, double giou_floor,
                 double giou_epsilon) {
  const LossInputs in = checked(logits, boxes, query_of_target, labels, target_boxes, offsets, num_boxes, class_weight,
                                loss_weight, kind, alpha, gamma, giou_floor, giou_epsilon);
  return needs_double(logits, boxes) ? set_loss_on_host<double>(in) : set_loss_on_host<float>(in);
}

template <typename T>
Gradients scale_on_host(const BackwardInputs& in) {
  Gradients result = new_gradients(in);
  const auto arguments = arguments_of<T>(in, result);
  const auto kernel = kernel_of<T>(cpu::kernels().scale_gradients_float, cpu::kernels().scale_gradients_double);
  in_parallel(arguments.layers * arguments.queries_per_layer, double(in.logits_gradient.size(3)),
              [&](int64_t begin, int64_t end) { kernel(arguments, begin, end); });
  return result;
}

Gradients set_loss_backward(std::optional<Tensor> loss_gradient, std::optional<Tensor> total_gradient,
                            std::optional<Tensor> loss_weight, Tensor logits_gradient, Tensor boxes_gradient,
                            ScalarType logits_type, ScalarType boxes_type) {
  const BackwardInputs in =
      checked(loss_gradient, total_gradient, loss_weight, logits_gradient, boxes_gradient, logits_type, boxes_type);
  return logits_gradient.scalar_type() == ScalarType::Double ? scale_on_host<double>(in) : scale_on_host<float>(in);
}
#endif

#if defined(DETR_WITH_CUDA)
template <typename T>
SetLoss set_loss_on_device(const LossInputs& in, void* stream) {
  const CostInputs& p = in.predictions;
  SetLoss result = new_results<T>(p);
  auto& [losses, total, logits_gradient, boxes_gradient] = result;
  const cuda::LossArguments<T> arguments = {batch_of(in),
                                            p.logits.size(3),
                                            elements("set_loss", "logits", p.logits),
                                            elements("set_loss", "boxes", p.boxes),
                                            in.query_of_target.const_data_ptr<int32_t>(),
                                            p.labels.const_data_ptr<int64_t>(),
                                            p.target_boxes.const_data_ptr<float>(),
                                            data_or_null(in.num_boxes),
                                            data_or_null(in.class_weight),
                                            data_or_null(in.loss_weight),
                                            in.kind,
                                            T(in.alpha),
                                            T(in.gamma),
                                            area_guard<T>("set_loss", in.giou_floor, in.giou_epsilon),
                                            losses.template mutable_data_ptr<T>(),
                                            total.template mutable_data_ptr<T>(),
                                            logits_gradient.template mutable_data_ptr<T>(),
                                            boxes_gradient.template mutable_data_ptr<T>()};
  if (arguments.batch.layers == 0) torch::stable::fill_(total, 0);  // by no block
  const Tensor scratch = new_bytes(p.logits, int64_t(cuda::set_loss_scratch_bytes(arguments.batch)));
  cuda::set_loss(arguments, scratch.mutable_data_ptr(), stream);
  return result;
}

SetLoss set_loss_cuda(Tensor logits, Tensor boxes, Tensor query_of_target, Tensor labels, Tensor target_boxes,
                      Tensor offsets, std::optional<Tensor> num_boxes, std::optional<Tensor> class_weight,
                      std::optional<Tensor> loss_weight, std::string kind, double alpha, double gamma,
                      double giou_floor, double giou_epsilon) {
  const OnDevice device(logits);
  const LossInputs in = checked(logits, boxes, query_of_target, labels, target_boxes, offsets, num_boxes, class_weight,
                                loss_weight, kind, alpha, gamma, giou_floor, giou_epsilon);
  check_devices("set_loss", in.predictions);
  check_device("set_loss", "query_of_target", query_of_target, logits, "logits");
  if (num_boxes) check_device("set_loss", "num_boxes", *num_boxes, logits, "logits");
  if (class_weight) check_device("set_loss", "class_weight", *class_weight, logits, "logits");
  if (loss_weight) check_device("set_loss", "loss_weight", *loss_weight, logits, "logits");
  return needs_double(logits, boxes) ? set_loss_on_device<double>(in, device.stream())
                                     : set_loss_on_device<float>(in, device.stream());
}

template <typename T>
Gradients scale_on_device(const BackwardInputs& in, void* stream) {
  Gradients result = new_gradients(in);
  cuda::scale_gradients(arguments_of<T>(in, result), stream);
  return result;
}

Gradients set_loss_backward_cuda(std::optional<Tensor> loss_gradient, std::optional<Tensor> total_gradient,
                                 std::optional<Tensor> loss_weight, Tensor logits_gradient, Tensor boxes_gradient,
                                 ScalarType logits_type, ScalarType boxes_type) {
  const OnDevice device(logits_gradient);
  const BackwardInputs in =
      checked(loss_gradient, total_gradient, loss_weight, logits_gradient, boxes_gradient, logits_type, boxes_type);
  const auto check_place = [&](const char* name, const Tensor& tensor) {
    check_device("set_loss_backward", name, tensor, logits_gradient, "logits_gradient");
  };
  if (loss_gradient) check_place("loss_gradient", *loss_gradient);
  if (total_gradient) check_place("total_gradient", *total_gradient);
  if (loss_weight) check_place("loss_weight", *loss_weight);
  check_place("boxes_gradient", boxes_gradient);
  return logits_gradient.scalar_type() == ScalarType::Double ? scale_on_device<double>(in, device.stream())
                                                             : scale_on_device<float>(in, device.stream());
}
#endif

}  // namespace
}  // namespace detr::ops

STABLE_TORCH_LIBRARY_FRAGMENT(DETR_LIBRARY, m) {
  m.def(
      "set_loss(Tensor logits, Tensor boxes, Tensor query_of_target, Tensor labels, Tensor target_boxes, "
      "Tensor offsets, Tensor? num_boxes, Tensor? class_weight, Tensor? loss_weight, str kind, float alpha, "
      "float gamma, float giou_floor=0.0, float giou_epsilon=0.0) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "set_loss_backward(Tensor? loss_gradient, Tensor? total_gradient, Tensor? loss_weight, Tensor logits_gradient, "
      "Tensor boxes_gradient, ScalarType logits_type, ScalarType boxes_type) -> (Tensor, Tensor)");
}

#if !defined(DETR_EMULATED)
STABLE_TORCH_LIBRARY_IMPL(DETR_LIBRARY, CPU, m) {
  m.impl("set_loss", TORCH_BOX(&detr::ops::set_loss));
  m.impl("set_loss_backward", TORCH_BOX(&detr::ops::set_loss_backward));
}
#endif

#if defined(DETR_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(DETR_LIBRARY, DETR_CUDA_KEY, m) {
  m.impl("set_loss", TORCH_BOX(&detr::ops::set_loss_cuda));
  m.impl("set_loss_backward", TORCH_BOX(&detr::ops::set_loss_backward_cuda));
}
#endif
