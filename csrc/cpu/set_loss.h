// Set loss of one problem: class, L1 and GIoU losses with their gradients, cardinality and class error, in one pass
// over the logits. Sums are kept in double and reduced in a fixed order. Carion et al. 2020; Zhu et al. 2021 (focal).
#pragma once

#include "matching_cost.h"

namespace detr::cpu {
namespace {

template <typename T>
int64_t largest_of(const T* row, int64_t classes) {
  int64_t best = 0;
  for (int64_t c = 1; c < classes; ++c)
    if (row[c] > row[best]) best = c;
  return best;
}

// argmax(row) is not the last class, where the first of equal logits counts.
template <typename T>
DETR_HD bool is_object(const T* row, int64_t classes) {
  Value<T> top = all_lanes(-kInfinity<T>);
  for (int64_t c = 0; c < classes - 1; c += kLanes<T>)
    top = larger(load_some<T>(row + c, classes - 1 - c, -kInfinity<T>), top);
  return classes > 1 && largest_lane(top) >= row[classes - 1];
}

// Weighted cross-entropy of one query. `row` [classes, padded] is overwritten; its gradient is written.
template <typename T>
DETR_HD double cross_entropy(const LossArguments<T>& a, T* row, int64_t label, T scale, T* gradient) {
  T largest;
  const T at_label = row[label];
  const T sum = exponentials<T>(row, a.classes, &largest);
  const T weight = a.class_weight[label] * scale;
  const T by_probability = weight / sum;
  for (int64_t c = 0; c < a.classes; c += kLanes<T>)
    store_some<T>(gradient + c, load<T>(row + c) * by_probability, a.classes - c);
  gradient[label] -= weight;
  return double(a.class_weight[label]) * (double(std::log(sum)) + double(largest) - double(at_label));
}

// Sigmoid focal loss of one query; `label` is -1 where all classes are negative.
template <typename T>
DETR_HD double focal(const LossArguments<T>& a, const T* row, int64_t label, T scale, T* gradient) {
  BlockSum<T> sum;
  for (int64_t c = 0; c < a.classes; c += kLanes<T>) {
    const auto s = sigmoid_of<LaneMath<T>>(load<T>(row + c));
    const auto term = focal_loss_negative<LaneMath<T>>(s, a.alpha, a.gamma);
    sum.add(c, lane_numbers<T>() < Int<T>(a.classes - c) ? term.loss : Value<T>{});
    store_some<T>(gradient + c, term.gradient * scale, a.classes - c);
  }
  double loss = sum.total();
  if (label >= 0) {
    const auto s = sigmoid_of<ScalarMath<T>>(row[label]);
    const auto positive = focal_loss_positive<ScalarMath<T>>(s, a.alpha, a.gamma);
    loss += double(positive.loss) - double(focal_loss_negative<ScalarMath<T>>(s, a.alpha, a.gamma).loss);
    gradient[label] = positive.gradient * scale;
  }
  return loss;
}

// L1 and GIoU of a matched pair, gradients into gradient [8].
template <typename T>
void box_losses(CentreBox<T> box, CentreBox<T> goal, T scale, LossSums& sums, T* gradient) {
  const Corners<T> corners = corners_of(box), goal_corners = corners_of(goal);
  const Overlap<T> overlap = overlap_of(corners, goal_corners);
  sums.box_loss += l1_distance(box, goal);
  sums.giou_loss += 1 - giou_of(overlap);
  const CentreBox<T> giou = giou_loss_gradient(corners, goal_corners, overlap);
  const T l1[4] = {sign(box.cx - goal.cx), sign(box.cy - goal.cy), sign(box.w - goal.w), sign(box.h - goal.h)};
  const T giou_parts[4] = {giou.cx, giou.cy, giou.w, giou.h};
  for (int k = 0; k < 4; ++k) {
    gradient[k] = l1[k] * scale;
    gradient[4 + k] = giou_parts[k] * scale;
  }
}

template <typename T>
void problem_loss(const LossArguments<T>& a, const Problem& problem, int32_t* target_of_query, T* row, LossSums& sums) {
  const int32_t* query_of_target = a.query_of_target + problem.layer * a.batch.targets + problem.first_target;
  for (int64_t q = 0; q < a.batch.queries; ++q) target_of_query[q] = -1;
  for (int64_t t = 0; t < problem.targets; ++t)
    if (query_of_target[t] >= 0) target_of_query[query_of_target[t]] = int32_t(problem.first_target + t);

  const T class_scale = a.class_scale[problem.layer];
  const bool softmax = is_softmax(a.kind);
  for (int64_t q = 0; q < a.batch.queries; ++q) {
    const int64_t at = problem.first_query + q, target = target_of_query[q];
    load_padded_row<T>(a.logits, at, a.classes, -kInfinity<T>, row);
    sums.objects_predicted += is_object(row, a.classes);
    T* boxes_gradient = a.boxes_gradient + at * 8;
    if (target >= 0) {
      const float* goal = a.target_boxes + 4 * target;
      sums.matched += 1;
      sums.correct += largest_of(row, a.classes) == a.labels[target];
      box_losses<T>(load_box<T>(a.boxes, at), {T(goal[0]), T(goal[1]), T(goal[2]), T(goal[3])}, a.box_scale, sums,
                    boxes_gradient);
    } else {
      for (int k = 0; k < 8; ++k) boxes_gradient[k] = 0;
    }
    const int64_t label = target >= 0 ? a.labels[target] : softmax ? a.classes - 1 : -1;
    T* gradient = a.logits_gradient + at * a.classes;
    sums.class_loss +=
        softmax ? cross_entropy(a, row, label, class_scale, gradient) : focal(a, row, label, class_scale, gradient);
  }
}

template <typename T>
void set_loss(const LossArguments<T>& a, int64_t begin, int64_t end) {
  const int64_t padded = round_up(a.classes, kLanes<T>);
  T* row = static_cast<T*>(scratch(Scratch::kCost, padded * sizeof(T) + a.batch.queries * sizeof(int32_t)));
  for (int64_t p = begin; p < end; ++p) {
    LossSums sums = {};
    problem_loss(a, Problem(a.batch, p), reinterpret_cast<int32_t*>(row + padded), row, sums);
    a.sums[p] = sums;
  }
}

// Gradients of queries [begin, end) of all layers, times the incoming gradient of their layer's losses.
template <typename T>
void scale_gradients(const ScaleArguments<T>& a, int64_t begin, int64_t end) {
  const int64_t classes = a.queries_per_layer ? a.logits_per_layer / a.queries_per_layer : 0;
  for (int64_t q = begin; q < end; ++q) {
    const T* incoming = a.loss_gradient + q / a.queries_per_layer * a.terms;
    store_scaled<T>(a.scaled_logits, a.logits_type, q * classes, (q + 1) * classes, a.logits_gradient, incoming[0]);
    const T* parts = a.boxes_gradient + q * 8;
    T box[4];
    for (int k = 0; k < 4; ++k) box[k] = incoming[1] * parts[k] + incoming[2] * parts[4 + k];
    store_scaled<T>(a.scaled_boxes, a.boxes_type, 4 * q, 4 * q + 4, box - 4 * q, T(1));
  }
}

}  // namespace
}  // namespace detr::cpu
