// Set loss of one problem: class, L1 and GIoU losses with their gradients, cardinality and class error, in one pass
// over the logits. Sums are kept in double and reduced in a fixed order. Carion et al. 2020; core/class_cost.h.
#pragma once

#include "../core/loss_gradient.h"
#include "matching_cost.h"

namespace detr::cpu {
namespace {

// argmax: the first of equal ones, and NaN is above all.
template <typename T>
int64_t largest_of(const T* row, int64_t classes) {
  int64_t best = 0;
  for (int64_t c = 1; c < classes && row[best] == row[best]; ++c)
    if (!(row[c] <= row[best])) best = c;
  return best;
}

// The last logit of a row and the largest of the others.
template <typename T>
struct RowPeaks {
  T others, last;

  // argmax is not the last class, where the first of equal logits counts.
  DETR_HD bool is_object() const { return others >= last; }
};

template <typename T>
DETR_HD RowPeaks<T> peaks_of(T* row, int64_t classes) {
  const T last = row[classes - 1];
  row[classes - 1] = -kInfinity<T>;
  const T others = largest_of_row(row, classes);
  row[classes - 1] = last;
  return {others, last};
}

// Where one query's gradient goes; whole vectors may be written where the next row, written later, is overwritten.
template <typename T>
struct GradientRow {
  T* to;
  bool may_overrun;

  DETR_HD void put(int64_t c, int64_t classes, Value<T> x) const {
    if (may_overrun) return store<T>(to + c, x);
    store_some<T>(to + c, x, classes - c);
  }
};

// Weighted cross-entropy of one query. `row` [classes, padded] is overwritten; its gradient is written.
template <typename T>
DETR_HD double cross_entropy(const LossArguments<T>& a, T* row, T largest, int64_t label, T scale,
                             GradientRow<T> gradient) {
  const T at_label = row[label];
  const T sum = exponentials<T>(row, a.classes, largest);
  const T weight = a.class_weight[label] * scale;
  const T by_probability = weight / sum;
  for (int64_t c = 0; c < a.classes; c += kLanes<T>) gradient.put(c, a.classes, load<T>(row + c) * by_probability);
  gradient.to[label] -= weight;
  return double(a.class_weight[label]) * (double(std::log(sum)) + double(largest) - double(at_label));
}

// Sum of the sigmoid losses of one query; `label` is -1 where all classes are negative, `iou` that of the box.
template <typename T>
DETR_HD double sigmoid_losses(const LossArguments<T>& a, const T* row, int64_t label, T iou, T scale,
                              GradientRow<T> gradient) {
  const NegativeWeight<T> weight = negative_weight(a.kind, a.alpha, a.gamma);
  BlockSum<T> sum;
  for (int64_t c = 0; c < a.classes; c += kLanes<T>) {
    const auto s = sigmoid_of<LaneMath<T>>(load<T>(row + c));
    const auto term = negative_example<LaneMath<T>>(s, weight);
    // The label's own term is left out here rather than subtracted later, which would cancel.
    const Index<T> negative = (lane_numbers<T>() < Int<T>(a.classes - c)) & (lane_numbers<T>() != Int<T>(label - c));
    sum.add(c, negative ? term.loss : Value<T>{});
    gradient.put(c, a.classes, term.gradient * scale);
  }
  double loss = sum.total();
  if (label >= 0) {
    const auto s = sigmoid_of<ScalarMath<T>>(row[label]);
    const auto positive = positive_example<ScalarMath<T>>(a.kind, s, iou, a.alpha, a.gamma);
    loss += double(positive.loss);
    gradient.to[label] = positive.gradient * scale;
  }
  return loss;
}

// L1 and GIoU of a matched pair, gradients into gradient [8]; returns the IoU.
template <typename T>
T box_losses(CentreBox<T> box, CentreBox<T> goal, AreaGuard<T> guard, T scale, LossSums& sums, T* gradient) {
  const Corners<T> corners = corners_of(box), goal_corners = corners_of(goal);
  const Overlap<T> overlap = overlap_of(corners, goal_corners);
  sums.box_loss += l1_distance(box, goal);
  sums.giou_loss += 1 - giou_or_nan(box, goal, guard);
  const CentreBox<T> giou = giou_loss_gradient(corners, goal_corners, overlap, guard);
  const T l1[4] = {sign(box.cx - goal.cx), sign(box.cy - goal.cy), sign(box.w - goal.w), sign(box.h - goal.h)};
  const T giou_parts[4] = {giou.cx, giou.cy, giou.w, giou.h};
  for (int k = 0; k < 4; ++k) {
    gradient[k] = l1[k] * scale;
    gradient[4 + k] = giou_parts[k] * scale;
  }
  return iou_of(overlap, guard);
}

// Loss of one query, whose logits are in `row`.
template <typename T>
void query_loss(const LossArguments<T>& a, int64_t at, int64_t target, T* row, RowPeaks<T> peaks, T class_scale,
                bool may_overrun, LossSums& sums) {
  sums.objects_predicted += peaks.is_object();
  T* boxes_gradient = a.boxes_gradient + at * 8;
  T iou = 0;
  if (target >= 0) {
    const float* goal = a.target_boxes + 4 * target;
    sums.matched += 1;
    sums.correct += largest_of(row, a.classes) == a.labels[target];
    iou = box_losses<T>(load_box<T>(a.boxes, at), {T(goal[0]), T(goal[1]), T(goal[2]), T(goal[3])}, a.guard,
                        a.box_scale, sums, boxes_gradient);
  } else {
    for (int k = 0; k < 8; ++k) boxes_gradient[k] = 0;
  }
  const GradientRow<T> gradient = {a.logits_gradient + at * a.classes, may_overrun};
  if (is_softmax(a.kind)) {
    const int64_t label = target >= 0 ? a.labels[target] : a.classes - 1;
    sums.class_loss += cross_entropy(a, row, larger(peaks.last, peaks.others), label, class_scale, gradient);
  } else {
    sums.class_loss += sigmoid_losses(a, row, target >= 0 ? a.labels[target] : -1, iou, class_scale, gradient);
  }
}

template <typename T>
void problem_loss(const LossArguments<T>& a, const Problem& problem, int32_t* target_of_query, T* rows,
                  LossSums& sums) {
  const int32_t* query_of_target = a.query_of_target + problem.layer * a.batch.targets + problem.first_target;
  const int64_t queries = a.batch.queries, padded = round_up(a.classes, kLanes<T>);
  for (int64_t q = 0; q < queries; ++q) target_of_query[q] = -1;
  for (int64_t t = 0; t < problem.targets; ++t)
    if (query_of_target[t] >= 0) target_of_query[query_of_target[t]] = int32_t(problem.first_target + t);

  RowPeaks<T> peaks[kRowBlock];
  for (int64_t start = 0; start < queries; start += kRowBlock) {
    const int64_t count = std::min(kRowBlock, queries - start);
    for (int64_t i = 0; i < count; ++i) {
      load_padded_row<T>(a.logits, problem.first_query + start + i, a.classes, -kInfinity<T>, rows + i * padded);
      peaks[i] = peaks_of(rows + i * padded, a.classes);
    }
    for (int64_t i = 0; i < count; ++i) {
      const int64_t q = start + i;
      const bool may_overrun = (queries - q - 1) * a.classes >= padded - a.classes;
      query_loss(a, problem.first_query + q, target_of_query[q], rows + i * padded, peaks[i],
                 a.class_scale[problem.layer], may_overrun, sums);
    }
  }
}

template <typename T>
void set_loss(const LossArguments<T>& a, int64_t begin, int64_t end) {
  const int64_t block = row_block_size<T>(a.classes);
  T* rows = static_cast<T*>(scratch(Scratch::kCost, block * sizeof(T) + a.batch.queries * sizeof(int32_t)));
  for (int64_t p = begin; p < end; ++p) {
    LossSums sums = {};
    problem_loss(a, Problem(a.batch, 1, p), reinterpret_cast<int32_t*>(rows + block), rows, sums);
    a.sums[p] = sums;
  }
}

// Gradients of queries [begin, end) of all layers, times the incoming gradient of their layer's losses.
template <typename T>
void scale_gradients(const ScaleArguments<T>& a, int64_t begin, int64_t end) {
  const int64_t classes = a.queries_per_layer ? a.logits_per_layer / a.queries_per_layer : 0;
  for (int64_t q = begin; q < end; ++q) {
    const int64_t layer = q / a.queries_per_layer;
    const T* logits = a.logits_gradient + q * classes;
    store_scaled<T>(a.scaled_logits, a.logits_type, q * classes, classes, logits, incoming_gradient(a, layer, 0));
    const T by_box = incoming_gradient(a, layer, 1), by_giou = incoming_gradient(a, layer, 2);
    const T* parts = a.boxes_gradient + q * 8;
    T box[4];
    for (int k = 0; k < 4; ++k) box[k] = scaled(parts[k], by_box) + scaled(parts[4 + k], by_giou);
    store_scaled<T>(a.scaled_boxes, a.boxes_type, 4 * q, 4, box, T(1));
  }
}

}  // namespace
}  // namespace detr::cpu
