// Minimum-cost assignment by shortest augmenting paths on compact slots.
//
// A slot is a column that has a row. Only slots take part in the search: all free columns together are one number per
// row, its best free cost, which only grows as columns are taken and is therefore refreshed when it is about to be
// used. A scan costs O(slots) whatever the number of columns. Rows whose cheapest column nobody else wants never
// search.
//
// Ties: the lowest column of equal minima; the lowest row in the greedy phase; a free column before a taken one; then
// the lowest slot. Forbidden pairs cost +infinity. A row that cannot be matched makes the cheapest row of its
// alternating tree stay out; that tree is closed for good (Berge's lemma), and "frozen" below.
//
// Sources: Jonker and Volgenant, Computing 38 (1987); Crouse, IEEE TAES 52(4), 2016. One thread solves one problem.
#pragma once

#include "arena.h"
#include "nearest_column.h"

namespace detr::cpu {
namespace {

// One problem, rows <= columns. Forbidden entries must be +infinity, or `solve` says that there are some.
template <typename T>
class Solver {
 public:
  Solver(Arena& arena, int64_t rows, int64_t columns)
      : rows_(rows), columns_(columns), width_(round_up(rows, kLanes<T>)) {
    best_cost_ = arena.take<T>(rows);
    lowest_cost_ = arena.take<T>(rows);
    key_ = arena.take<T>(width_);
    slot_price_ = arena.take<T>(width_);
    saved_price_ = arena.take<T>(width_);
    distance_ = arena.take<T>(width_);
    row_price_ = arena.take<T>(width_);
    taken_ = arena.take<T>(columns);
    gathered_ = arena.take<T>(rows * width_);
    parent_ = arena.take<Int<T>>(width_);
    best_column_ = arena.take<int32_t>(rows);
    filled_ = arena.take<int32_t>(rows);
    row_of_slot_ = arena.take<int32_t>(width_);
    column_of_slot_ = arena.take<int32_t>(width_);
    popped_ = arena.take<int32_t>(width_);
    waiting_ = arena.take<int32_t>(rows);
    frozen_ = arena.take<bool>(width_);
  }

  // Rows of the cost are `stride` apart. column_of_row [rows], -1 where a row had to stay out; prices [rows] and
  // [columns], or null. Returns false, with nothing written, if `all_allowed` is asked for and some entry is forbidden.
  bool solve(const T* cost, int64_t stride, bool all_allowed, int32_t* column_of_row, T* row_price, T* column_price) {
    cost_ = cost, stride_ = stride;
    if (!start_greedily() && all_allowed) return false;
    if (row_price)
      for (int64_t i = 0; i < rows_; ++i) row_price[i] = 0;
    if (waiting_count_ > 0) {
      prepare_search();
      for (int64_t k = 0; k < waiting_count_; ++k) search_from(waiting_[k]);
    }
    for (int64_t i = 0; i < rows_; ++i) column_of_row[i] = -1;
    if (column_price)
      for (int64_t j = 0; j < columns_; ++j) column_price[j] = 0;
    for (int64_t k = 0; k < slots_; ++k) {
      column_of_row[row_of_slot_[k]] = column_of_slot_[k];
      if (row_price) row_price[row_of_slot_[k]] = row_price_[k];
      if (column_price)
        column_price[column_of_slot_[k]] = waiting_count_ > 0 && frozen_[k] ? saved_price_[k] : slot_price_[k];
    }
    return true;
  }

 private:
  static constexpr int32_t kRoot = -1;

  const T* cost_row(int64_t row) const { return cost_ + row * stride_; }

  // Every row takes its cheapest column if nobody before it has; the others wait. False if an entry is forbidden.
  bool start_greedily() {
    slots_ = waiting_count_ = 0;
    std::memset(taken_, 0, columns_ * sizeof(T));
    Index<T> largest{};
    for (int64_t i = 0; i < rows_; ++i) {
      const Nearest<T> nearest = nearest_column<T>(cost_row(i), nullptr, columns_, &largest);
      lowest_cost_[i] = best_cost_[i] = nearest.cost;
      best_column_[i] = int32_t(nearest.column);
      if (nearest.column < 0) continue;  // no allowed pair: the row stays out at price 0
      if (taken_[nearest.column] == 0) {
        add_slot(int32_t(i), int32_t(nearest.column), nearest.cost);
      } else {
        waiting_[waiting_count_++] = int32_t(i);
      }
    }
    return !lane_mask(largest >= magnitude_bits<T>(all_lanes(kCostLimit<T>)));
  }

  void add_slot(int32_t row, int32_t column, T price) {
    taken_[column] = kInfinity<T>;
    row_of_slot_[slots_] = row;
    column_of_slot_[slots_] = column;
    row_price_[slots_] = price;
    slot_price_[slots_] = 0;
    ++slots_;
  }

  void prepare_search() {
    for (int64_t i = 0; i < rows_; ++i) filled_[i] = 0;
    for (int64_t k = slots_; k < width_; ++k) slot_price_[k] = 0;
    for (int64_t k = 0; k < width_; ++k) frozen_[k] = false;
  }

  // Costs of a row at the slots' columns, +infinity beyond them; a row is gathered when it is first scanned.
  const T* gathered_row(int32_t row) {
    T* costs = gathered_ + row * width_;
    if (filled_[row] == 0)
      for (int64_t k = slots_; k < width_; ++k) costs[k] = kInfinity<T>;
    const T* all = cost_row(row);
    for (int64_t k = filled_[row]; k < slots_; ++k) costs[k] = all[column_of_slot_[k]];
    filled_[row] = int32_t(slots_);
    return costs;
  }

  // True if the row's best free column is still free; otherwise looks for the next best one.
  bool best_is_free(int32_t row) {
    if (best_column_[row] < 0 || taken_[best_column_[row]] == 0) return true;
    Index<T> ignored{};
    const Nearest<T> nearest = nearest_column<T>(cost_row(row), taken_, columns_, &ignored);
    best_cost_[row] = nearest.cost;
    best_column_[row] = int32_t(nearest.column);
    return false;
  }

  bool is_popped(int64_t slot) const { return slot_price_[slot] == -kInfinity<T>; }

  // Distance through the popped slot's row to its best free column. Rounding must not undercut what was popped before.
  T exit_of(int64_t slot) const {
    return larger((distance_[slot] - row_price_[slot]) + best_cost_[row_of_slot_[slot]], distance_[slot]);
  }

  // Relaxes all slots from a row at `distance`; returns the smallest key. Popped and frozen slots have price -infinity,
  // which keeps their keys.
  T relax_from(int32_t row, T price, T distance, Int<T> from) {
    const T* __restrict costs = gathered_row(row);
    const T* __restrict prices = slot_price_;
    T* __restrict keys = key_;
    Int<T>* __restrict parents = parent_;
    const int64_t slots = slots_;
    const Value<T> base = all_lanes(distance - price), floor = all_lanes(distance);
    const Index<T> parent = all_lanes_index<T>(from);
    Value<T> least = all_lanes(kInfinity<T>);
    for (int64_t k = 0; k < slots; k += kLanes<T>) {
      const Value<T> path = larger(base + (load<T>(costs + k) - load<T>(prices + k)), floor);
      const Value<T> key = load<T>(keys + k);
      const Index<T> closer = path < key;
      const Value<T> relaxed = closer ? path : key;
      store<T>(keys + k, relaxed);
      store_index<T>(parents + k, closer ? parent : load_index<T>(parents + k));
      least = smaller(relaxed, least);
    }
    return smallest_nonnegative_lane(least);
  }

  T smallest_key() const {
    Value<T> least = all_lanes(kInfinity<T>);
    for (int64_t k = 0; k < slots_; k += kLanes<T>) least = smaller(load<T>(key_ + k), least);
    return smallest_nonnegative_lane(least);
  }

  // First slot with this key; one that leads to a free column wins over one that does not.
  int64_t slot_with(T key) const {
    int64_t first = -1;
    for (int64_t k = 0; k < slots_; k += kLanes<T>) {
      const uint32_t equal = lane_mask(load<T>(key_ + k) == key);
      if (!equal) continue;
      const uint32_t exits = equal & lane_mask(load<T>(slot_price_ + k) == -kInfinity<T>);
      if (exits) return k + __builtin_ctz(exits);
      if (first < 0) first = k + __builtin_ctz(equal);
    }
    return first;
  }

  void search_from(int32_t root) {
    for (int64_t k = 0; k < width_; k += kLanes<T>) store<T>(key_ + k, all_lanes(kInfinity<T>));
    const T root_price = lowest_cost_[root];
    T root_key = best_cost_[root] - root_price, distance = 0;
    int32_t row = root, from = kRoot;
    T price = root_price;
    popped_count_ = 0;
    for (;;) {
      T least = relax_from(row, price, distance, from);
      int64_t slot;
      for (;;) {
        if (root_key <= least && root_key < kInfinity<T>) {
          slot = kRoot;
          if (best_is_free(root)) break;
          root_key = best_cost_[root] - root_price;
          continue;
        }
        if (!(least < kInfinity<T>)) return leave_one_out(root);
        slot = slot_with(least);
        if (!is_popped(slot) || best_is_free(row_of_slot_[slot])) break;
        set_lane(key_, slot, exit_of(slot));
        least = smallest_key();
      }
      distance = slot == kRoot ? root_key : least;
      if (slot == kRoot || is_popped(slot)) return augment(root, slot, distance);
      row = row_of_slot_[slot];
      price = row_price_[slot];
      from = int32_t(slot);
      pop(slot, distance);
    }
  }

  void pop(int64_t slot, T distance) {
    popped_[popped_count_++] = int32_t(slot);
    distance_[slot] = distance;
    saved_price_[slot] = slot_price_[slot];
    set_lane(slot_price_, slot, -kInfinity<T>);
    set_lane(key_, slot, exit_of(slot));
  }

  // array[slot] = x by a whole vector: the next scan loads vectors, which a narrower store would make wait.
  static DETR_HD void set_lane(T* array, int64_t slot, T x) {
    T* block = array + slot / kLanes<T> * kLanes<T>;
    const Index<T> here = lane_numbers<T>() == Int<T>(slot % kLanes<T>);
    store<T>(block, here ? all_lanes(x) : load<T>(block));
  }

  // Raises the prices of the tree's rows and lowers those of its columns until the path is tight.
  void update_prices(T distance) {
    for (int64_t n = 0; n < popped_count_; ++n) {
      const int64_t slot = popped_[n];
      const T slack = distance - distance_[slot];
      row_price_[slot] += slack;
      saved_price_[slot] -= slack;
    }
  }

  // Every slot of the path takes over the row before it; the last one's own row has left it.
  void shift_rows(int32_t root, T root_price, int64_t slot) {
    while (slot != kRoot) {
      const int64_t before = parent_[slot];
      row_of_slot_[slot] = before == kRoot ? root : row_of_slot_[before];
      row_price_[slot] = before == kRoot ? root_price : row_price_[before];
      slot = before;
    }
  }

  void augment(int32_t root, int64_t last, T distance) {
    update_prices(distance);
    for (int64_t n = 0; n < popped_count_; ++n) slot_price_[popped_[n]] = saved_price_[popped_[n]];
    const T root_price = lowest_cost_[root] + distance;
    const int32_t end = last == kRoot ? root : row_of_slot_[last];
    const T end_price = last == kRoot ? root_price : row_price_[last];
    shift_rows(root, root_price, last);
    add_slot(end, best_column_[end], end_price);
  }

  // No free column can be reached: one row of the tree stays out, the one whose absence costs least. Staying out is a
  // pair of its own with a cost above all sums; distances here are what lies above that cost. Rows of trees that were
  // closed before may also be the one. Prices of rows that stay out are 0, of the other closed rows at most 0.
  void leave_one_out(int32_t root) {
    const int64_t tree = popped_count_;
    T least = -lowest_cost_[root];
    int64_t out = kRoot;
    for (int64_t n = 0; n < tree; ++n) {
      const int64_t slot = popped_[n];
      const T exit = distance_[slot] - row_price_[slot];
      if (exit < least || (exit == least && out != kRoot && slot < out)) least = exit, out = slot;
    }
    // Slots that were frozen before this search, reached through them.
    relax_frozen(root, lowest_cost_[root], 0, kRoot);
    for (int64_t n = 0; n < tree; ++n)
      relax_frozen(row_of_slot_[popped_[n]], row_price_[popped_[n]], distance_[popped_[n]], popped_[n]);
    for (;;) {
      int64_t next = -1;
      for (int64_t k = 0; k < slots_; ++k)
        if (frozen_[k] && key_[k] < least && (next < 0 || key_[k] < key_[next])) next = k;
      if (next < 0) break;
      distance_[next] = key_[next];
      key_[next] = kInfinity<T>;
      frozen_[next] = false;  // in the tree now
      popped_[popped_count_++] = int32_t(next);
      const T exit = distance_[next] - row_price_[next];
      if (exit < least) least = exit, out = next;
      relax_frozen(row_of_slot_[next], row_price_[next], distance_[next], int32_t(next));
    }
    close_tree(root, out, least);
  }

  void relax_frozen(int32_t row, T price, T distance, int32_t from) {
    const T* costs = gathered_row(row);
    for (int64_t k = 0; k < slots_; ++k) {
      if (!frozen_[k]) continue;
      const T path = (distance - price) + (costs[k] - saved_price_[k]);
      if (path < key_[k]) key_[k] = path, parent_[k] = from;
    }
  }

  void close_tree(int32_t root, int64_t out, T distance) {
    update_prices(distance);
    for (int64_t n = 0; n < popped_count_; ++n) frozen_[popped_[n]] = true;
    shift_rows(root, lowest_cost_[root] + distance, out);
  }

  int64_t rows_, columns_, width_, stride_ = 0;
  int64_t slots_ = 0, waiting_count_ = 0, popped_count_ = 0;
  const T* cost_ = nullptr;      // [rows, columns], rows stride_ apart
  T *best_cost_, *lowest_cost_;  // [rows] best free cost; cost of the best column of all
  T *key_, *slot_price_, *saved_price_, *distance_, *row_price_;  // [slots] price of a popped or frozen slot is saved
  T* taken_;                                                      // [columns] +infinity where taken, else 0
  T* gathered_;                                                   // [rows, width]
  Int<T>* parent_;                                                // [slots] slot whose row reached it first, or kRoot
  int32_t *best_column_, *filled_;                                // [rows]
  int32_t *row_of_slot_, *column_of_slot_, *popped_, *waiting_;
  bool* frozen_;
};

// Copies [rows, columns], rows `stride` apart, with forbidden entries as +infinity, transposed if asked; returns
// whether there were any.
template <typename T>
bool copy_allowed(const T* cost, int64_t stride, int64_t rows, int64_t columns, bool transpose, T* to) {
  bool forbidden = false;
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) {
      const T x = cost[i * stride + j];
      const bool allowed = magnitude(x) < kCostLimit<T>;
      forbidden |= !allowed;
      to[transpose ? j * rows + i : i * columns + j] = allowed ? x : kInfinity<T>;
    }
  }
  return forbidden;
}

// Solves a copy of cost [targets, queries] in which the smaller side is the rows.
template <typename T>
bool solve_copy(const T* cost, int64_t stride, int64_t targets, int64_t queries, int32_t* query_of_target,
                T* target_price, T* query_price) {
  const bool transpose = targets > queries;
  const int64_t rows = transpose ? queries : targets, columns = transpose ? targets : queries;
  Arena measure(nullptr);
  Solver<T>(measure, rows, columns);
  measure.take<T>(rows * columns);
  measure.take<int32_t>(rows);
  Arena arena(scratch(Scratch::kSolver, measure.used()));
  Solver<T> solver(arena, rows, columns);
  T* copied = arena.take<T>(rows * columns);
  int32_t* target_of_query = arena.take<int32_t>(rows);
  const bool forbidden = copy_allowed<T>(cost, stride, targets, queries, transpose, copied);
  if (!transpose) {
    solver.solve(copied, columns, false, query_of_target, target_price, query_price);
    return forbidden;
  }
  solver.solve(copied, columns, false, target_of_query, query_price, target_price);
  for (int64_t t = 0; t < targets; ++t) query_of_target[t] = -1;
  for (int64_t q = 0; q < queries; ++q)
    if (target_of_query[q] >= 0) query_of_target[target_of_query[q]] = int32_t(q);
  return forbidden;
}

// cost [targets, queries], rows `stride` apart; prices may be null. Returns whether any pair was forbidden.
template <typename T>
bool solve_problem(const T* cost, int64_t stride, int64_t targets, int64_t queries, int32_t* query_of_target,
                   T* target_price, T* query_price) {
  if (targets <= queries) {
    Arena measure(nullptr);
    Solver<T>(measure, targets, queries);
    Arena arena(scratch(Scratch::kSolver, measure.used()));
    Solver<T> solver(arena, targets, queries);
    if (solver.solve(cost, stride, true, query_of_target, target_price, query_price)) return false;
  }
  return solve_copy(cost, stride, targets, queries, query_of_target, target_price, query_price);
}

// Where a problem's numbers are.
struct Problem {
  int64_t layer, image, group, queries;
  int64_t first_query;            // of all layers and images
  int64_t first_target, targets;  // of the image
  int64_t first_row;              // of the result, of all layers

  Problem(const Batch& batch, int64_t groups, int64_t p)
      : layer(p / groups / batch.images),
        image(p / groups % batch.images),
        group(p % groups),
        queries(batch.queries / groups),
        first_query(p * queries),
        first_target(batch.offsets[image]),
        targets(batch.offsets[image + 1] - first_target),
        first_row((layer * batch.targets + first_target) * groups + group * targets) {}

  // Queries of the group to queries of the image.
  void number_queries(int32_t* query_of_target) const {
    for (int64_t t = 0; group > 0 && t < targets; ++t)
      if (query_of_target[t] >= 0) query_of_target[t] += int32_t(group * queries);
  }
};

template <typename T>
bool assign(const AssignmentArguments<T>& a, int64_t begin, int64_t end) {
  bool forbidden = false;
  for (int64_t p = begin; p < end; ++p) {
    const Problem problem(a.batch, a.groups, p);
    const int64_t row = problem.layer * a.batch.targets + problem.first_target;
    int32_t* result = a.query_of_target + problem.first_row;
    forbidden |= solve_problem<T>(a.cost + row * a.batch.queries + problem.group * problem.queries, a.batch.queries,
                                  problem.targets, problem.queries, result,
                                  a.target_price ? a.target_price + problem.first_row : nullptr,
                                  a.query_price ? a.query_price + problem.first_query : nullptr);
    problem.number_queries(result);
  }
  return forbidden;
}

}  // namespace
}  // namespace detr::cpu
