// Matching cost of every target with the queries of its own image, and matching without storing it.
// cost = box_weight * L1 + class_weight * class cost - giou_weight * GIoU, as in Carion et al. 2020, equation 2.
// Queries run along the lanes; a problem's cost is written once, row by row.
#pragma once

#include "../core/class_cost.h"
#include "assignment.h"
#include "elements.h"
#include "lane_math.h"

namespace detr::cpu {
namespace {

constexpr Forbidden kNoneForbidden = {0, std::numeric_limits<int64_t>::max()};

template <typename T>
DETR_HD T largest_of_row(const T* row, int64_t classes) {
  Value<T> top = all_lanes(-kInfinity<T>);
  for (int64_t c = 0; c < classes; c += kLanes<T>) top = larger(load<T>(row + c), top);
  return largest_lane(top);
}

// exp(x - largest) of a row in place; returns its sum. Lanes past `classes` must hold -infinity.
template <typename T>
DETR_HD T exponentials(T* row, int64_t classes, T largest) {
  BlockSum<T> sum;
  for (int64_t c = 0; c < classes; c += kLanes<T>) {
    const Value<T> e = LaneMath<T>::exp(load<T>(row + c) - largest);
    store<T>(row + c, e);
    sum.add(c, e);
  }
  return sum.total();
}

template <typename T>
DETR_HD void load_padded_row(const Elements& from, int64_t row, int64_t width, T fill, T* to) {
  for (int64_t k = width; k < round_up(width, kLanes<T>); ++k) to[k] = fill;
  load_row<T>(from, row, width, to);
}

// Rows of logits are read in blocks: one loop over all rows hides the latency of each row's reductions.
constexpr int64_t kRowBlock = 16;

template <typename T>
int64_t row_block_size(int64_t classes) {
  return kRowBlock * round_up(classes, kLanes<T>);
}

template <typename T>
DETR_HD bool is_known(const CostArguments<T>& a, int64_t label) {
  return label >= 0 && label < label_limit(a.kind, a.classes);
}

// Class terms of one problem into cost [targets, queries]: softmax.
template <typename T>
void softmax_costs(const CostArguments<T>& a, const Problem& problem, T* rows, T* cost) {
  const int64_t queries = problem.queries, padded = round_up(a.classes, kLanes<T>);
  const int64_t* labels = a.labels + problem.first_target;
  T largest[kRowBlock], scale[kRowBlock];
  for (int64_t start = 0; start < queries; start += kRowBlock) {
    const int64_t count = std::min(kRowBlock, queries - start);
    for (int64_t i = 0; i < count; ++i) {
      load_padded_row<T>(a.logits, problem.first_query + start + i, a.classes, -kInfinity<T>, rows + i * padded);
      largest[i] = largest_of_row(rows + i * padded, a.classes);
    }
    for (int64_t i = 0; i < count; ++i)
      scale[i] = -a.class_weight / exponentials(rows + i * padded, a.classes, largest[i]);
    for (int64_t t = 0; t < problem.targets; ++t) {
      T* out = cost + t * queries + start;
      const bool known = is_known(a, labels[t]);
      for (int64_t i = 0; i < count; ++i)
        out[i] = known ? rows[i * padded + labels[t]] * scale[i] : std::numeric_limits<T>::quiet_NaN();
    }
  }
}

// The same, focal, which reads the logits of the targets' labels only.
template <typename T>
void focal_costs(const CostArguments<T>& a, const Problem& problem, T* cost) {
  const int64_t queries = problem.queries, size = problem.targets * queries;
  const int64_t* labels = a.labels + problem.first_target;
  with_reader<T>(a.logits, [&](auto logit) {
    for (int64_t start = 0; start < queries; start += kRowBlock) {  // whose cache lines the labels share
      const int64_t count = std::min(kRowBlock, queries - start), row = (problem.first_query + start) * a.classes;
      for (int64_t t = 0; t < problem.targets; ++t) {
        T* out = cost + t * queries + start;
        const bool known = is_known(a, labels[t]);
        for (int64_t i = 0; i < count; ++i)
          out[i] = known ? logit(row + i * a.classes + labels[t]) : std::numeric_limits<T>::quiet_NaN();
      }
    }
  });
  for (int64_t k = 0; k < size; k += kLanes<T>) {
    const Value<T> x = load_some<T>(cost + k, size - k, T(0));
    const Value<T> term =
        focal_cost<LaneMath<T>>(x, a.alpha, a.gamma, a.kind == ClassKind::kFocalStable, a.class_epsilon);
    store_some<T>(cost + k, a.class_weight * term, size - k);
  }
}

template <typename T>
struct BoxLanes {
  T *cx, *cy, *w, *h;  // [queries], padded to full vectors
};

// Adds L1 and GIoU terms of one target to its row of costs [queries].
template <typename T>
void add_box_costs(const CostArguments<T>& a, const BoxLanes<T>& boxes, int64_t queries, CentreBox<T> target, T* cost) {
  const CentreBox<Value<T>> goal = {all_lanes(target.cx), all_lanes(target.cy), all_lanes(target.w),
                                    all_lanes(target.h)};
  for (int64_t q = 0; q < queries; q += kLanes<T>) {
    const CentreBox<Value<T>> box = {load<T>(boxes.cx + q), load<T>(boxes.cy + q), load<T>(boxes.w + q),
                                     load<T>(boxes.h + q)};
    const int64_t count = queries - q;
    const Value<T> class_cost = load_some<T>(cost + q, count, T(0));
    const Value<T> box_cost = a.box_weight * l1_distance(box, goal) + class_cost;
    store_some<T>(cost + q, box_cost - a.giou_weight * giou_or_nan(box, goal, a.guard), count);
  }
}

template <typename T>
DETR_HD CentreBox<T> target_box(const CostArguments<T>& a, int64_t target) {
  const float* box = a.target_boxes + 4 * target;
  return {T(box[0]), T(box[1]), T(box[2]), T(box[3])};
}

// Cost [targets, queries] of one problem.
template <typename T>
void problem_cost(const CostArguments<T>& a, const Problem& problem, T* work, T* cost) {
  const int64_t queries = problem.queries, padded = round_up(queries, kLanes<T>);
  const BoxLanes<T> boxes = {work, work + padded, work + 2 * padded, work + 3 * padded};
  with_reader<T>(a.boxes, [&](auto number) {
    for (int64_t q = 0; q < queries; ++q) {
      const int64_t at = 4 * (problem.first_query + q);
      boxes.cx[q] = number(at), boxes.cy[q] = number(at + 1), boxes.w[q] = number(at + 2), boxes.h[q] = number(at + 3);
    }
  });
  for (int64_t q = queries; q < padded; ++q) boxes.cx[q] = boxes.cy[q] = boxes.w[q] = boxes.h[q] = 0;
  is_softmax(a.kind) ? softmax_costs(a, problem, work + 4 * padded, cost) : focal_costs(a, problem, cost);
  for (int64_t t = 0; t < problem.targets; ++t)
    add_box_costs(a, boxes, queries, target_box(a, problem.first_target + t), cost + t * queries);
}

template <typename T>
int64_t cost_work_size(int64_t queries, int64_t classes) {
  return 4 * round_up(queries, kLanes<T>) + row_block_size<T>(classes);
}

// Which terms of a forbidden pair are at fault.
template <typename T>
int64_t terms_at_fault(const CostArguments<T>& a, int64_t query, int64_t target, T* row) {
  int64_t terms = 0;
  const int64_t label = a.labels[target];
  load_padded_row<T>(a.logits, query, a.classes, -kInfinity<T>, row);
  if (!is_known(a, label)) {
    terms |= kLabelTerm;
  } else {
    T term;
    if (is_softmax(a.kind)) {
      const T sum = exponentials(row, a.classes, largest_of_row(row, a.classes));
      term = row[label] / sum;
    } else {
      const bool stable = a.kind == ClassKind::kFocalStable;
      term = focal_cost<ScalarMath<T>>(row[label], a.alpha, a.gamma, stable, a.class_epsilon);
    }
    if (!(magnitude(a.class_weight * term) < kCostLimit<T>)) terms |= kClassTerm;
  }
  const CentreBox<T> box = load_box<T>(a.boxes, query), goal = target_box(a, target);
  if (!(magnitude(a.box_weight * l1_distance(box, goal)) < kCostLimit<T>)) terms |= kBoxTerm;
  if (!(magnitude(a.giou_weight * giou_or_nan(box, goal, a.guard)) < kCostLimit<T>)) terms |= kGiouTerm;
  return terms ? terms : int64_t(kSumTerm);
}

template <typename T>
bool has_forbidden(const T* cost, int64_t count) {
  Index<T> largest{};
  for (int64_t k = 0; k < count; k += kLanes<T>)
    largest = larger(magnitude_bits<T>(load_some<T>(cost + k, count - k, T(0))), largest);
  return lane_mask(largest >= magnitude_bits<T>(all_lanes(kCostLimit<T>))) != 0;
}

// Counts forbidden pairs and says where the first one is.
template <typename T>
Forbidden find_forbidden(const CostArguments<T>& a, const Problem& problem, const T* cost, T* row) {
  Forbidden found = kNoneForbidden;
  for (int64_t t = 0; t < problem.targets; ++t) {
    for (int64_t q = 0; q < problem.queries; ++q) {
      if (magnitude(cost[t * problem.queries + q]) < kCostLimit<T>) continue;
      if (found.count++ > 0) continue;
      const int64_t terms = terms_at_fault(a, problem.first_query + q, problem.first_target + t, row);
      const int64_t query = problem.group * problem.queries + q;
      const int64_t position = ((problem.layer << kImageBits | problem.image) << kTargetBits | t) << kQueryBits | query;
      found.first = position << kTermBits | terms;
    }
  }
  return found;
}

template <typename T>
void matching_cost(const CostArguments<T>& a, T* cost, Forbidden* forbidden, int64_t begin, int64_t end) {
  const int64_t work_size = cost_work_size<T>(a.batch.queries, a.classes);
  T* work = static_cast<T*>(scratch(Scratch::kCost, work_size * sizeof(T)));
  for (int64_t p = begin; p < end; ++p) {
    const Problem problem(a.batch, 1, p);
    forbidden[p] = kNoneForbidden;
    if (problem.targets == 0) continue;
    T* own = cost + (problem.layer * a.batch.targets + problem.first_target) * a.batch.queries;
    problem_cost(a, problem, work, own);
    if (has_forbidden(own, problem.targets * a.batch.queries)) forbidden[p] = find_forbidden(a, problem, own, work);
  }
}

template <typename T>
void match(const CostArguments<T>& a, int32_t* query_of_target, Forbidden* forbidden, int64_t begin, int64_t end) {
  for (int64_t p = begin; p < end; ++p) {
    const Problem problem(a.batch, a.groups, p);
    forbidden[p] = kNoneForbidden;
    if (problem.targets == 0) continue;
    const int64_t size = round_up(problem.targets * problem.queries, kLanes<T>);
    const int64_t work_size = cost_work_size<T>(problem.queries, a.classes);
    T* cost = static_cast<T*>(scratch(Scratch::kCost, (size + work_size) * sizeof(T)));
    problem_cost(a, problem, cost + size, cost);
    int32_t* result = query_of_target + problem.first_row;
    if (solve_problem<T>(cost, problem.queries, problem.targets, problem.queries, result, nullptr, nullptr))
      forbidden[p] = find_forbidden(a, problem, cost, cost + size);
    problem.number_queries(result);
  }
}

}  // namespace
}  // namespace detr::cpu
